from __future__ import annotations

from datetime import datetime
from io import StringIO
from pathlib import Path

import pytest
from bars import BARS, OURS, VLLM, judge
from records import Record, Results
from report import bars_table, markdown, speeds
from rich.console import Console


@pytest.fixture
def results() -> Results:
    results = Results()
    for repeat, seconds in enumerate((4.0, 2.0, 8.0)):
        results.add(Record(OURS, "base-32", repeat, seconds, 2048, 0.5, 0.01, 1 << 30, 5.0))
    results.add(Record(VLLM, "base-32", 0, 4.0, 2048, None, None, 1 << 31, 60.0))
    results.add(Record(OURS, "registered-1", 0, 4.0, 4096, 0.5, 0.01, 1 << 30, 5.0))
    results.add(Record(OURS, "registered-1000", 0, 5.0, 4096, 0.5, 0.01, 1 << 30, 5.0))
    return results


def _text(*tables: object) -> str:
    console = Console(width=140, file=StringIO())
    with console.capture() as captured:
        console.print(*tables)
    return captured.get()


def test_speeds(results: Results) -> None:
    (ours,) = (line for line in _text(speeds(results)).splitlines() if "512 (256-1024)" in line)
    cells = [cell.strip() for cell in ours.strip("│").split("│")]
    assert cells == ["base-32", OURS, "512 (256-1024)", "500", "10.0", "1024", "5.0", "3"]
    (theirs,) = (line for line in _text(speeds(results)).splitlines() if VLLM in line)
    assert [cell.strip() for cell in theirs.strip("│").split("│")][3:5] == ["", ""]


def test_bars(results: Results) -> None:
    text = _text(bars_table(judge(results, [bar.name for bar in BARS])))
    assert text.count("not measured") == len(BARS) - 1
    assert "≥ 1.1" in text


def test_page(results: Results) -> None:
    judged = judge(results, ["base-32 / vllm"])
    page = markdown(results, judged, datetime(2026, 11, 25))
    assert page.startswith("# Results\n\nMeasured 25 November 2026 on ")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["base-32 / vllm", "1", "≥ 1.1", "NO"] in cells
    assert ["base-32", OURS, "512 (256-1024)", "500", "10.0", "1024", "5.0", "3"] in cells


def test_plots(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra manylora[bench] has it")
    from plots import plot_registered, plot_speeds  # noqa: PLC0415

    plot_speeds(results, tmp_path / "speeds.svg")
    plot_registered(results, tmp_path / "registered.svg")
    assert VLLM in (tmp_path / "speeds.svg").read_text()
    assert "registered adapters" in (tmp_path / "registered.svg").read_text()
    plot_speeds(Results(), tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
