"""Runs the benchmark: by itself, or beside its peers.

    python benchmarks/run.py [--peers] [--model DIRECTORY] [--out DIRECTORY]
    python benchmarks/run.py --report OUT [--peers] [--docs DIRECTORY]

Without --peers: our own ratios, in about a minute. With it: everything that issue 4 has a bar for.
Every run is a line of records.jsonl as soon as it is done; the last line printed is JSON with the
bars, and the exit code is 0 only where all of them hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from alone import run_alone
from bars import BARS, Judged, as_json, judge
from paths import HERE, Places
from phases import MIXED, QUICK, RANK_16, REGISTERED, ZIPF, Bench, run_phase
from plots import plot_registered, plot_speeds
from records import Results, load
from report import bars_table, markdown, speeds
from rich.console import Console

from manylora.demo.base import get_base

RECORDS = "records.jsonl"
WIDTH = 140
QUICK_BARS = (
    "single-adapter per token / single-base",
    "distinct-32 / base-32",
    "distinct-32 grpc / in-process",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", action="store_true", help="everything; 20 to 85 minutes")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, help="where records, tables and plots go")
    parser.add_argument(
        "--report", type=Path, help="measure nothing: report an earlier run's --out"
    )
    parser.add_argument("--docs", type=Path, help="where a page of results and its plots go, too")
    options = parser.parse_args()
    names = [bar.name for bar in BARS] if options.peers else QUICK_BARS
    if options.report:
        out, failures, results = options.report, [], load(options.report / RECORDS)
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        bench, out = _prepare(options.model, options.out)
        failures = measure(bench, out) if options.peers else run_phase(bench, QUICK)
        results = bench.results
    judged = judge(results, names)
    report(results, judged, out)
    if options.docs:
        write_docs(results, judged, out, options.docs)
    print(f"records, tables and plots: {out}", *failures, sep="\n")
    print(json.dumps(as_json(judged)), flush=True)
    return 0 if all(j.holds for j in judged) and not failures else 1


def measure(bench: Bench, out: Path) -> list[str]:
    """Everything that there is a bar for, and more; returns what went wrong."""
    failures = []
    for phase in (RANK_16, MIXED, ZIPF, REGISTERED):
        failures += run_phase(bench, phase)
    return failures + run_alone(bench) + _steps(bench, out)


def _steps(bench: Bench, out: Path) -> list[str]:
    """Where a step's time goes, in a process that nothing else has run in."""
    command = [sys.executable, str(HERE / "steps.py"), f"--model={bench.model}", f"--out={out}"]
    code = subprocess.run(command, check=False).returncode
    return [f"steps.py ended with {code}"] if code else []


def report(results: Results, judged: Sequence[Judged], out: Path) -> None:
    """Prints and writes tables, draws plots."""
    with (out / "tables.txt").open("w") as file:
        for console in (Console(width=WIDTH), Console(width=WIDTH, file=file)):
            console.print(speeds(results), bars_table(judged))
    plot_speeds(results, out / "speeds.svg")
    plot_registered(results, out / "registered.svg")


def write_docs(results: Results, judged: Sequence[Judged], out: Path, docs: Path) -> None:
    """A page of results, and the plots that there are."""
    docs.mkdir(parents=True, exist_ok=True)
    when = datetime.fromtimestamp((out / RECORDS).stat().st_mtime)
    page = markdown(results, judged, when)
    if (out / "steps.md").exists():
        page += (
            f"\n## Where a decode step's time goes\n\n{(out / 'steps.md').read_text().strip()}\n"
        )
    (docs / "results.md").write_text(page)
    for plot in out.glob("*.svg"):
        shutil.copy(plot, docs)


def _prepare(model: Path | None, out: Path | None) -> tuple[Bench, Path]:
    console, began, places = Console(highlight=False), time.monotonic(), Places.default()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {line}", soft_wrap=True)

    model = (model or get_base(places.cache, console)).resolve()
    out = out or places.cache / "bench" / "results" / f"{datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    vocab = int(json.loads((model / "config.json").read_text())["vocab_size"])
    return Bench(model, vocab, places, Results(out / RECORDS), say), out


if __name__ == "__main__":
    sys.exit(main())
