"""The demo's tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from manylora.client import Residency
from manylora.demo.adapters import Trained
from manylora.demo.asking import Answer, Comparison, Score


def adapters_table(trained: Sequence[Trained], loads: Sequence[Residency]) -> Table:
    table = Table("adapter", "rank", "modules", "trained", "size", "loaded in")
    for adapter, load in zip(trained, loads, strict=True):
        table.add_row(
            load.adapter,
            str(adapter.task.rank),
            adapter.task.target_modules,
            f"{adapter.seconds:.0f} s" if adapter.seconds else "before",
            f"{load.size_bytes / 2**20:.1f} MiB",
            f"{load.load_seconds * 1000:.0f} ms",
        )
    return table


def answers_table(answers: Sequence[Sequence[Answer]]) -> Table:
    """One row for each prompt: the prompt, then every model's answer."""
    names = [answer.adapter or "base" for answer in answers[0]]
    table = Table("prompt", *names, show_lines=True, expand=True)
    for row in answers:
        cells = [Text(a.text, style="" if a.done else "dim") for a in row]
        table.add_row(Text(row[0].example.text), *cells)
    return table


def scores_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("task", "held out", "score", "base", "adapter")
    for result in comparisons:
        table.add_row(
            result.task.title,
            f"{result.base.rows} rows",
            result.task.metric,
            _score(result.base),
            Text(_score(result.adapter), style="bold"),
        )
    return table


def _score(score: Score) -> str:
    return f"{score.mean:.0%} ({score.perfect} perfect)"
