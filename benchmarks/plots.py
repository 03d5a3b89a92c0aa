"""A run's results for people, as plots (SVG)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from bars import OURS
from matplotlib.figure import Figure
from records import Record, Results, Spread
from workloads import REGISTERED, WORKLOADS

mpl.rcParams["svg.fonttype"] = "none"  # text stays text: small files


def plot_speeds(results: Results, file: Path) -> None:
    """Tokens/s of every contender, workload by workload; lines from the least to the most. Nothing
    where none was measured."""
    measured = {r.workload for r in results.records}
    names = [n for n in WORKLOADS if n in measured and not n.startswith("registered")]
    if not names:
        return
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
            yerr=_whiskers([s for _, s in known]),
            label=contender,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("output tokens/s")
    axes.set_xticks(range(len(names)), names)
    axes.legend(fontsize=7)
    figure.savefig(file)


def plot_registered(results: Results, file: Path) -> None:
    """Tokens/s by the number of registered adapters; nothing where that was not measured."""
    found = [(n, results.spread(OURS, f"registered-{n}", _speed)) for n in REGISTERED]
    known = [(n, s) for n, s in found if s is not None]
    if not known:
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        [n for n, _ in known],
        [s.median for _, s in known],
        yerr=_whiskers([s for _, s in known]),
        marker="o",
        capsize=3,
    )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("registered adapters, popularity 1/k, adapter memory for 32")
    axes.set_ylabel("output tokens/s")
    figure.savefig(file)


def _whiskers(spreads: Sequence[Spread]) -> list[list[float]]:
    """How far down and up each one's error bar goes from the median."""
    return [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]


def _speed(record: Record) -> float:
    return record.tokens_per_second
