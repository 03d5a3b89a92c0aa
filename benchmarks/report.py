"""A run's results for people: a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bars import Judged
from records import Record, Results, Spread
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


def plot_speeds(results: Results, file: Path) -> None:
    """Tokens/s of every contender, workload by workload; lines from the least to the most."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = [n for n in WORKLOADS if any(r.workload == n for r in results.records)]
    contenders = list(dict.fromkeys(r.contender for r in results.records))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(contenders))
    for i, contender in enumerate(contenders):
        found = [(x, results.spread(contender, n, _speed)) for x, n in enumerate(names)]
        known = [(x, s) for x, s in found if s is not None]
        bars = axes.bar(
            [x + (i + 0.5) * width - 0.4 for x, _ in known],
            [s.median for _, s in known],
            width,
            yerr=[[s.median - s.low for _, s in known], [s.high - s.median for _, s in known]],
            label=contender,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("output tokens/s")
    axes.set_xticks(range(len(names)), names)
    axes.legend(fontsize=7)
    figure.savefig(file)


def _speed(record: Record) -> float:
    return record.tokens_per_second


def _cells(results: Results, contender: str, workload: str) -> list[str]:
    def of(what: str, unit: float, digits: int) -> str:
        return _text(results.spread(contender, workload, lambda r: getattr(r, what)), unit, digits)

    speed = results.spread(contender, workload, _speed)
    return [
        of("tokens_per_second", 1, 0),
        of("first_token", 1e3, 0),
        of("per_token", 1e3, 1),
        of("peak_bytes", 2**-20, 0),
        of("start_seconds", 1, 1),
        str(speed.count if speed else 0),
    ]


def _text(spread: Spread | None, unit: float, digits: int) -> str:
    if spread is None:
        return ""
    median, low, high = (f"{v * unit:.{digits}f}" for v in (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} ({low}-{high})"
