"""The bars that the kernels have set themselves, measured: ratios of medians taken in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernels_attention import SMOLLM2, Attention, Calls, call_costs
from kernels_edits import Case, Edits, base_products
from kernels_timing import READ_BYTES, Ring, medians

DISTINCT = (
    Case(32, 32, 16, 576, 1536),
    Case(32, 32, 64, 576, 1536),
    Case(32, 32, 16, 1536, 576),
    Case(32, 32, 16, 4096, 4096),
    Case(8, 8, 16, 4096, 14336),
)
"""Decodes whose weights are more than a core's own cache has room for."""

PREFILLS = (
    Case(256, 1, 16, 576, 1536),
    Case(256, 1, 16, 1536, 576),
    Case(256, 1, 16, 4096, 4096),
)


@dataclass(slots=True, frozen=True)
class Bar:
    """at_least: whether `bar` is the least or the most that the value may be."""

    name: str
    value: float
    bar: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def as_json(bars: list[Bar]) -> dict[str, object]:
    """The last line of a run."""
    return {
        "bars": {
            bar.name: {"value": round(bar.value, 3), "bar": bar.bar, "holds": bar.holds}
            for bar in bars
        }
    }


ROUNDS = 3


def measure(ring: Ring, budget: float) -> Iterator[Bar]:
    """Every ratio three times over the run, of which the middle one counts. The calls, no ratios,
    are measured after each of the others, and where torch's own was quickest counts: a shared
    machine has spells in which all takes twice as long."""
    calls: list[Calls] = []
    rounds: list[list[Bar]] = [[] for _ in range(ROUNDS)]
    for found in rounds:
        for measured in (_distinct, _torchs_ways, _base, _attention):
            for bar in measured(ring, budget / ROUNDS):
                found.append(bar)
                calls.append(call_costs(budget / 10))
    for same in zip(*rounds, strict=True):
        yield sorted(same, key=lambda bar: bar.value)[ROUNDS // 2]
    for name, us in min(calls, key=lambda spell: spell.torchs).ours.items():
        yield Bar(f"a call of {name} beyond its work, us", us, 3)


def _distinct(ring: Ring, budget: float) -> Iterator[Bar]:
    """Weights from memory, beside the reading of as many bytes."""
    for case in DISTINCT:
        edits, read = medians([Edits(case, ring).ours, ring.reader()], budget)
        limit = read * case.nbytes / READ_BYTES
        yield Bar(f"decode, {case} / reading the weights", edits / limit, 1.3)


def _torchs_ways(ring: Ring, budget: float) -> Iterator[Bar]:
    """The same weights each time."""
    edits = Edits(DISTINCT[0], ring, modules=1)
    ours, bmm, einsum = medians([edits.ours, edits.bmm, edits.einsum], budget)
    yield Bar(f"bmm on gathered weights / ours, {edits.case}", bmm / ours, 8, at_least=True)
    yield Bar(f"gather + einsum / ours, {edits.case}", einsum / ours, 15, at_least=True)


def _base(ring: Ring, budget: float) -> Iterator[Bar]:
    """Beside the best of `base_products`."""
    wanted = [("decode", DISTINCT[0], 0.2), *(("prefill", case, 0.15) for case in PREFILLS)]
    for what, case, bar in wanted:
        products = base_products(case.rows, case.in_size, case.out_size)
        ours, *bases = medians([Edits(case, ring, modules=1).ours, *products], budget)
        yield Bar(f"{what}, {case} / base product", ours / min(bases), bar)


def _attention(ring: Ring, budget: float) -> Iterator[Bar]:
    step = Attention(SMOLLM2, 32, 2000, ring, shuffled=False)
    ours, read = medians([step.ours, ring.reader()], budget)
    limit = read * step.nbytes / READ_BYTES
    yield Bar("paged attention, 32 x 2000 / reading keys and values", ours / limit, 1.3)
