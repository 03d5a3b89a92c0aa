"""What was measured: records, and what is made of several of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peers.protocol import Outcome


@dataclass(slots=True)
class Record:
    """One run of a workload by a contender.

    first_token: seconds, median of the requests; per_token: seconds a token after the first,
    median of the requests; None where the contender cannot tell. peak_bytes: the most memory that
    its processes have held so far. start_seconds: from its start to its being ready.
    """

    contender: str
    workload: str
    repeat: int
    seconds: float
    tokens: int
    first_token: float | None
    per_token: float | None
    peak_bytes: int
    start_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True)
class Figure:
    """One number that is not a workload's, such as the seconds of a start."""

    figure: str
    value: float


def first_token(outcome: Outcome) -> float | None:
    return statistics.median(outcome.first) if outcome.first else None


def per_token(outcome: Outcome) -> float | None:
    """Every request of a batch has as many tokens."""
    if not outcome.first or not outcome.last:
        return None
    after_first = outcome.tokens / len(outcome.first) - 1
    if after_first <= 0:
        return None
    pairs = zip(outcome.first, outcome.last, strict=True)
    return statistics.median(last - first for first, last in pairs) / after_first


@dataclass(slots=True, frozen=True)
class Spread:
    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.median(known), min(known), max(known), len(known))


@dataclass(slots=True)
class Results:
    """All that one run of the benchmark measured; every addition is one more line of `log`."""

    log: Path | None = None
    records: list[Record] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def add(self, entry: Record | Figure) -> None:
        if isinstance(entry, Record):
            self.records.append(entry)
        else:
            self.figures.append(entry)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{json.dumps(_line(entry))}\n")

    def spread(
        self, contender: str, workload: str, what: Callable[[Record], float | None]
    ) -> Spread | None:
        found = (r for r in self.records if (r.contender, r.workload) == (contender, workload))
        return spread(map(what, found))

    def figure(self, name: str) -> Spread | None:
        return spread(f.value for f in self.figures if f.figure == name)


def _line(entry: Record | Figure) -> dict[str, object]:
    if isinstance(entry, Record):
        return asdict(entry) | {"tokens_per_second": entry.tokens_per_second}
    return asdict(entry)


def load(log: Path) -> Results:
    """What a run wrote."""
    results = Results()
    for line in log.read_text().splitlines():
        values = json.loads(line)
        values.pop("tokens_per_second", None)
        results.add(Figure(**values) if "figure" in values else Record(**values))
    return results
