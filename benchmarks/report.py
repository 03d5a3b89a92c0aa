"""A run's results for people, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from bars import Judged
from records import Results, Spread
from rich.table import Table
from workloads import WORKLOADS


def speeds(results: Results) -> Table:
    """One line for each contender and workload; medians, with the least and the most of them."""
    table = Table(
        "workload", "contender", "tokens/s", "first token, ms", "per token, ms", "peak MiB",
        "start s", "runs", title="medians (least-most)",
    )  # fmt: skip
    for name in WORKLOADS:
        for contender in dict.fromkeys(r.contender for r in results.records if r.workload == name):
            table.add_row(name, contender, *_cells(results, contender, name))
    return table


def bars_table(judged: Sequence[Judged]) -> Table:
    table = Table("bar", "value", "wanted", "holds")
    for j in judged:
        value = "not measured" if j.value is None else f"{j.value:.3g}"
        sign = "≥" if j.bar.at_least else "≤"
        table.add_row(j.bar.name, value, f"{sign} {j.bar.bar:g}", "yes" if j.holds else "NO")
    return table


def _cells(results: Results, contender: str, workload: str) -> list[str]:
    def of(what: str, unit: float, digits: int) -> str:
        return _text(results.spread(contender, workload, lambda r: getattr(r, what)), unit, digits)

    runs = results.spread(contender, workload, lambda r: r.seconds)
    return [
        of("tokens_per_second", 1, 0),
        of("first_token", 1e3, 0),
        of("per_token", 1e3, 1),
        of("peak_bytes", 2**-20, 0),
        of("start_seconds", 1, 1),
        str(runs.count if runs else 0),
    ]


def _text(spread: Spread | None, unit: float, digits: int) -> str:
    if spread is None:
        return ""
    median, low, high = (f"{v * unit:.{digits}f}" for v in (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} ({low}-{high})"
