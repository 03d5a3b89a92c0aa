"""What the kernels cost on this CPU, beside the machine's limit, torch's ways and the base product.

    python benchmarks/kernels_bench.py [--threads 2] [--quick] [--plot PNG]

Runs for each instruction set that the machine has but the plain one, in a process of its own in
which oneDNN and torch are held to it too: a machine with AMX also shows what one without it would.
Prints tables, the times predicted for a GPU beside them, and as a last line the bars as JSON. Exits
0 only where all bars hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import kernels_report as report
import torch
from kernels_attention import besides, decodes
from kernels_bars import Bar, as_json, measure
from kernels_edits import SHAPES, table
from kernels_timing import READ_BYTES, Ring, medians, settle
from kernels_training import trainings

from manylora.kernels import cpu

HELD_TO = {
    "amx": {},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
"""What holds oneDNN and torch to an instruction set."""

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="rough answers in half a minute")
    parser.add_argument("--plot", type=Path, default=ROOT / "build" / "bench-kernels.png")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here is not None:
        _measure_here(options.quick, options.here)
        return 0
    print(f"{_processor()}, {options.threads} threads, torch {torch.__version__}\n{report.LEGEND}")
    found = {isa: _measure_held_to(isa) for isa in reversed(cpu.isas()) if isa in HELD_TO}
    report.print_predictions()
    report.plot({isa: part["lines"] for isa, part in found.items()}, options.plot)
    bars = [
        Bar(**{**bar, "name": f"{isa}: {bar['name']}"})
        for isa, part in found.items()
        for bar in part["bars"]
    ]
    print(f"\nplot: {options.plot}\n")
    report.print_bars(bars)
    print(json.dumps(as_json(bars)))
    return 0 if all(bar.holds for bar in bars) else 1


def _measure_held_to(isa: str) -> dict[str, list[dict[str, float]]]:
    """Runs `_measure_here` in a process of its own, which prints its tables."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        environment = {**os.environ, **HELD_TO[isa], "MANYLORA_ISA": isa}
        command = [sys.executable, *sys.orig_argv[1:], "--here", file.name]
        sys.stdout.flush()
        subprocess.run(command, env=environment, check=True)
        found: dict[str, list[dict[str, float]]] = json.load(file)
        return found


def _measure_here(quick: bool, to: Path) -> None:
    ring = Ring()
    settle(ring.reader())
    (read,) = medians([ring.reader()], 0.5)
    bandwidth = READ_BYTES / read / 1e9
    print(f"\n{cpu.current_isa()}: reads {bandwidth:.1f} GB/s")
    bars = list(measure(ring, 0.2 if quick else 1.0))
    report.print_bars(bars)
    report.print_decodes(decodes(ring, 0.1 if quick else 0.5))
    report.print_besides(besides(ring, 0.1 if quick else 0.3))
    report.print_besides(trainings(0.1 if quick else 0.5))
    lines = []
    for model in SHAPES:
        print(f"\n{model}, {cpu.current_isa()}\n{report.HEAD}")
        for line in table(model, ring, 0.005 if quick else 0.05):
            report.print_line(line)
            lines.append({name: getattr(line, name) for name in ("cold", "limit", "warm", "base")})
    sys.stdout.flush()
    to.write_text(json.dumps({"bars": [asdict(bar) for bar in bars], "lines": lines}))


def _processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
