"""Runs the benchmark: by itself, or beside its peers.

    python benchmarks/run.py [--peers] [--model DIRECTORY] [--out DIRECTORY]

Without --peers: our own ratios, in about a minute. With it: everything that issue 4 has a bar for.
Every run is a line of records.jsonl as soon as it is done; the last line printed is JSON with the
bars, and the exit code is 0 only where all of them hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from alone import run_alone
from bars import BARS, as_json, judge
from paths import Places
from phases import MIXED, QUICK, RANK_16, ZIPF, Bench, run_phase
from records import Results
from report import bars_table, plot_speeds, speeds
from rich.console import Console

from manylora.demo.base import get_base

QUICK_BARS = (
    "single-adapter per token / single-base",
    "distinct-32 / base-32",
    "distinct-32 grpc / in-process",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", action="store_true", help="everything; about 20 minutes")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, help="where records, table and plot go")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    console = Console(highlight=False)
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {line}")

    places = Places.default()
    model = options.model or get_base(places.cache, console)
    out = options.out or places.cache / "bench" / "results" / f"{datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    vocab = int(json.loads((model / "config.json").read_text())["vocab_size"])
    bench = Bench(model.resolve(), vocab, places, Results(out / "records.jsonl"), say)
    failures = _everything(bench) if options.peers else run_phase(bench, QUICK)
    return _report(bench, out, failures, [b.name for b in BARS] if options.peers else QUICK_BARS)


def _everything(bench: Bench) -> list[str]:
    failures = []
    for phase in (RANK_16, MIXED, ZIPF):
        failures += run_phase(bench, phase)
    return failures + run_alone(bench)


def _report(bench: Bench, out: Path, failures: list[str], names: Sequence[str]) -> int:
    results = bench.results
    judged = judge(results, names)
    wide = Console(width=140, highlight=False)
    wide.print(speeds(results), bars_table(judged))
    with (out / "table.txt").open("w") as file:
        Console(width=140, file=file).print(speeds(results), bars_table(judged))
    plot_speeds(results, out / "speeds.svg")
    wide.print(f"records, table and plot: {out}", *failures, sep="\n")
    print(json.dumps(as_json(judged)), flush=True)
    return 0 if all(j.holds for j in judged) and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
