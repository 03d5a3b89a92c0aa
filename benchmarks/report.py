"""A run's results for people, as tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from io import StringIO
from pathlib import Path

from bars import Judged
from records import Results, Spread
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS

from manylora.kernels import cpu

PAGE_WIDTH = 160


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


def markdown(results: Results, judged: Sequence[Judged], when: datetime) -> str:
    """The page of a run's results, for docs."""
    text = StringIO()
    console = Console(file=text, width=PAGE_WIDTH)
    print(f"# Results\n\nMeasured {when:%d %B %Y} on {machine()}.\n", file=text)
    for table, title in ((bars_table(judged), "Bars"), (speeds(results), "Medians (least-most)")):
        table.box, table.title = MARKDOWN, None
        print(f"## {title}\n", file=text)
        console.print(table)
        print(file=text)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join(lines).strip() + "\n"


def machine() -> str:
    """This machine: processor, cores and what our kernels use of it."""
    name = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (at.partition(":")[2].strip() for at in lines if at.startswith("model name")), name
        )
    return f"{os.cpu_count()} cores of {name} ({cpu.current_isa()} kernels)"


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
