"""The low-rank edits on this CPU: beside the reading of their bytes, torch's ways, the base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from kernels_timing import DTYPE, READ_BYTES, Call, Ring, medians, takes_bfloat16

from manylora import kernels
from manylora.kernels import cpu

MODULES = 512
"""Different weights that the turns of a case go through, unless the ring holds fewer."""

MOST_GATHERED = 40 << 20
"""bmm and einsum copy every row's weights; where that is more bytes, they are not timed."""

SHAPES = {
    "SmolLM2-135M": ((576, 576), (576, 1536), (1536, 576)),
    "Llama-3-8B": ((4096, 4096), (4096, 14336), (14336, 4096)),
}
ROWS_AND_ADAPTERS = (
    (1, 1),
    (8, 1),
    (8, 8),
    (32, 1),
    (32, 8),
    (32, 32),
    (128, 1),
    (128, 8),
    (128, 32),
)
RANKS = (8, 16, 64)


@dataclass(slots=True, frozen=True)
class Case:
    """`rows` rows dealt out to `adapters` adapters of one rank, in_size -> out_size."""

    rows: int
    adapters: int
    rank: int
    in_size: int
    out_size: int

    @property
    def nbytes(self) -> int:
        """A and B of all adapters in bfloat16, each read once."""
        return self.adapters * self.rank * (self.in_size + self.out_size) * DTYPE.itemsize

    @property
    def gathered(self) -> int:
        """A and B of every row's adapter, in bytes."""
        return self.rows * self.nbytes // self.adapters

    def __str__(self) -> str:
        which = f"{self.adapters} x r{self.rank}"
        return f"{self.rows} rows, {which}, {self.in_size}->{self.out_size}"


def cases(shape: tuple[int, int]) -> Iterator[Case]:
    for rows, adapters in ROWS_AND_ADAPTERS:
        for rank in RANKS:
            yield Case(rows, adapters, rank, *shape)


class Edits:
    """A case's tensors: `modules` modules of every adapter, packed, in the ring. All have the
    weights of the first.

    a [adapters, rank, in], b [adapters, out, rank]: as peft has them.
    """

    def __init__(self, case: Case, ring: Ring, modules: int = MODULES) -> None:
        self.case = case
        self.a = torch.randn(case.adapters, case.rank, case.in_size).to(DTYPE) / 32
        self.b = torch.randn(case.adapters, case.out_size, case.rank).to(DTYPE) / 32
        packed, within = cpu.pack_factors([*zip(self.a, self.b, strict=True)], DTYPE, before=0)
        starts = ring.walk(len(packed), modules)
        self.modules = len(starts)
        self.pool = ring.values
        self.x = torch.randn(case.rows, case.in_size).to(DTYPE)
        self.y = torch.zeros(case.rows, case.out_size, dtype=DTYPE)
        self.index = torch.arange(case.rows) % case.adapters
        self.plan = kernels.make_plan(self.index.numpy().astype(np.int32))
        for start in starts:
            self.pool[start : start + len(packed)] = packed
        self.groups = [kernels.SliceGroup.single(m, case.out_size) for m in range(self.modules)]
        self.table = kernels.EditTable(case.adapters, self.modules)
        ranks, scales = np.full(self.modules, case.rank), np.ones(self.modules)
        for slot in range(case.adapters):
            offsets = np.full((self.modules, 5), -1, np.int64)
            offsets[:, :2] = np.array(starts)[:, None] + within[slot]
            self.table.write(slot, ranks.astype(np.int32), scales.astype(np.float32), offsets)

    def ours(self, turn: int) -> None:
        group = self.groups[turn % self.modules]
        cpu.apply_edits_(self.y, self.x, group, self.pool, self.table, self.plan)

    def bmm(self, _: int) -> None:
        a, b = self.a[self.index], self.b[self.index]
        self.y += torch.bmm(b, torch.bmm(a, self.x.unsqueeze(2))).squeeze(2)

    def einsum(self, _: int) -> None:
        a, b = self.a[self.index], self.b[self.index]
        self.y += torch.einsum("bor,br->bo", b, torch.einsum("bri,bi->br", a, self.x))


def base_products(rows: int, in_size: int, out_size: int) -> list[Call]:
    """The base product of `rows` rows: ours, F.linear, oneDNN's with its weight reordered."""
    x, w = torch.randn(rows, in_size).to(DTYPE), torch.randn(out_size, in_size).to(DTYPE)
    ours = cpu.PackedWeight(w, cpu.HugeArena())
    calls: list[Call] = [lambda _: cpu.linear(x, ours), lambda _: F.linear(x, w)]
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and takes_bfloat16():
        packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
        linear = torch.ops.mkldnn._linear_pointwise
        calls.append(lambda _: linear(x, packed, None, "none", [], ""))
    return calls


@dataclass(slots=True, frozen=True)
class Line:
    """A case's line of the table, in microseconds; None: not timed.

    cold: weights from memory. limit: reading them once, at the bandwidth of the run. warm: the same
    weights again and again, as for all that follows. base: the best of `base_products`.
    """

    case: Case
    cold: float
    limit: float
    warm: float
    bmm: float | None
    einsum: float | None
    base: float


def table(model: str, ring: Ring, budget: float) -> Iterator[Line]:
    """A line for each case of a model's shapes."""
    (read,) = medians([ring.reader()], 0.3)
    for shape in SHAPES[model]:
        bases = {
            rows: min(medians(base_products(rows, *shape), budget, 100)) for rows in (1, 8, 32, 128)
        }
        for case in cases(shape):
            yield _line(case, ring, read / READ_BYTES, bases[case.rows], budget)


def _line(case: Case, ring: Ring, per_byte: float, base: float, budget: float) -> Line:
    cold_edits = Edits(case, ring)
    (cold,) = medians([cold_edits.ours], budget, cold_edits.modules)
    warm_edits = Edits(case, ring, modules=1)  # may lie where the others did
    others: list[Call] = []
    if case.gathered <= MOST_GATHERED:
        others = [warm_edits.bmm, warm_edits.einsum]
    warm, *rest = (t * 1e6 for t in medians([warm_edits.ours, *others], budget, 200))
    bmm, einsum = rest or (None, None)
    return Line(case, cold * 1e6, case.nbytes * per_byte * 1e6, warm, bmm, einsum, base * 1e6)
