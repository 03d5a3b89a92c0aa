"""The bars that the project has set itself, each from what one run measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from records import Record, Results, Spread

OURS, OVER_GRPC = "manylora", "manylora-grpc"
VLLM, VLLM_LORA, PEFT = "vllm", "vllm-lora", "transformers-peft"

COLD, RESIDENT = "cold-adapter", "resident-adapter"
START_SECONDS, OVERHEAD_MIB = "serve-start-seconds", "serve-overhead-mib"

Value = Callable[[Results], float | None]


@dataclass(slots=True, frozen=True)
class Bar:
    """at_least: whether `bar` is the least or the most that the value may be."""

    name: str
    bar: float
    at_least: bool
    value: Value

    def holds(self, value: float) -> bool:
        return value >= self.bar if self.at_least else value <= self.bar


@dataclass(slots=True, frozen=True)
class Judged:
    """value: None where it could not be measured, and then the bar does not hold."""

    bar: Bar
    value: float | None

    @property
    def holds(self) -> bool:
        return self.value is not None and self.bar.holds(self.value)


def judge(results: Results, names: Sequence[str]) -> list[Judged]:
    return [Judged(bar, bar.value(results)) for bar in BARS if bar.name in names]


def as_json(judged: Sequence[Judged]) -> dict[str, object]:
    """The last line of a run."""
    return {
        "bars": {
            j.bar.name: {
                "value": None if j.value is None else round(j.value, 3),
                "bar": j.bar.bar,
                "holds": j.holds,
            }
            for j in judged
        }
    }


def _speed(above: tuple[str, str], below: tuple[str, str]) -> Value:
    """Tokens/s of one (contender, workload) over another's."""
    return _ratio(above, below, lambda record: record.tokens_per_second)


def _latency(above: tuple[str, str], below: tuple[str, str]) -> Value:
    """Time per output token of one (contender, workload) over another's."""
    return _ratio(above, below, lambda record: record.per_token)


def _ratio(
    above: tuple[str, str], below: tuple[str, str], what: Callable[[Record], float | None]
) -> Value:
    def value(results: Results) -> float | None:
        over, under = (results.spread(*of, what) for of in (above, below))
        return over.median / under.median if over and under else None

    return value


def _cold_milliseconds(results: Results) -> float | None:
    cold, resident = (
        results.spread(OVER_GRPC, workload, lambda record: record.first_token)
        for workload in (COLD, RESIDENT)
    )
    return (cold.median - resident.median) * 1e3 if cold and resident else None


def _figure(name: str) -> Value:
    def value(results: Results) -> float | None:
        found: Spread | None = results.figure(name)
        return found.median if found else None

    return value


BARS = (
    Bar("base-32 / vllm", 1.1, True, _speed((OURS, "base-32"), (VLLM, "base-32"))),
    Bar(
        "single-base per token / vllm",
        0.9,
        False,
        _latency((OURS, "single-base"), (VLLM, "single-base")),
    ),
    Bar(
        "single-adapter per token / single-base",
        1.15,
        False,
        _latency((OURS, "single-adapter"), (OURS, "single-base")),
    ),
    Bar("distinct-32 / base-32", 0.75, True, _speed((OURS, "distinct-32"), (OURS, "base-32"))),
    Bar("distinct-32 / vllm", 4, True, _speed((OURS, "distinct-32"), (VLLM_LORA, "distinct-32"))),
    Bar(
        "mixed-rank-32 / vllm",
        8,
        True,
        _speed((OURS, "mixed-rank-32"), (VLLM_LORA, "mixed-rank-32")),
    ),
    Bar(
        "zipf-128 memory for 8 / for 64",
        0.8,
        True,
        _speed((OURS, "zipf-128"), (OURS, "zipf-128-roomy")),
    ),
    Bar(
        "distinct-32 grpc / in-process",
        0.85,
        True,
        _speed((OVER_GRPC, "distinct-32"), (OURS, "distinct-32")),
    ),
    Bar(
        "distinct-32 / transformers-peft",
        8,
        True,
        _speed((OURS, "distinct-32"), (PEFT, "distinct-32")),
    ),
    Bar("cold adapter, ms", 40, False, _cold_milliseconds),
    Bar("serve start, s", 10, False, _figure(START_SECONDS)),
    Bar("memory above weights, KV, adapters, MiB", 600, False, _figure(OVERHEAD_MIB)),
)
