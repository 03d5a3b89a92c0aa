"""docs/benchmarks.md says what the runner does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bars import BARS
from phases import MIXED, RANK_16, ZIPF
from workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()


def test_every_bar_is_there_with_its_value() -> None:
    rows = re.findall(r"^\| (.+) \| ([≥≤]) ([\d.]+) \|$", PAGE, re.MULTILINE)
    wanted = [(bar.name, "≥" if bar.at_least else "≤", bar.bar) for bar in BARS]
    assert [(name, sign, float(value)) for name, sign, value in rows] == wanted


@pytest.mark.parametrize("entry", [*RANK_16, *MIXED, *ZIPF], ids=lambda entry: entry.contender)
def test_every_contender_and_workload_is_there(entry) -> None:
    words = re.findall(r"[\w.-]+", PAGE)
    assert entry.contender in words
    assert entry.repeats.keys() <= set(words)
    assert entry.repeats.keys() <= WORKLOADS.keys()


@pytest.mark.parametrize("line", re.findall(r"^\$ (.+)$", PAGE, re.MULTILINE))
def test_examples(line: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", PAGE, re.MULTILINE):
        assert f"\n{target}:" in makefile
