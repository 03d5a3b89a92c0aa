"""The matrix: every served PEFT method on every architecture, all of one in one mixed batch.

`python -m manylora_testing.matrix` prints the largest difference to peft in each cell, and exits 0
only where all hold.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from manylora import kernels
from manylora.server.engine.model import load_model
from manylora_testing.flat import FlatRunner, Stream
from manylora_testing.methods import METHODS, PLACES, make_method, methods_of, peft_rows
from manylora_testing.models import VOCAB, tiny_model

TOLERANCE = 1e-4  # of float32 logits of order one
CPU = torch.device("cpu")


def run_column(
    arch: str, directory: Path, *, backend: str | None = None, fused: bool = True
) -> Mapping[str, tuple[float, float]]:
    """All methods of one architecture and rows of the base, in one flat batch.

    Returns:
        method, or "base" → largest difference of logits to peft's; and how far the adapter's are
        from the base's.
    """
    path = tiny_model(arch, directory / "base")
    auto = transformers.AutoModelForCausalLM
    base = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    adapters = {
        method: make_method(method, arch, base, directory / method) for method in methods_of(arch)
    }
    chosen = kernels.select(CPU, backend)
    model = load_model(path, "float32", CPU, chosen, fused=fused)
    runner = FlatRunner(model, adapters, chosen, blocks=2 * len(adapters) + 8)
    generator = torch.Generator().manual_seed(5)
    streams = [
        Stream(method, _prompt(generator, 5 + i % 9), watched=True, starts_at=i % 3)
        for i, method in enumerate([*adapters, None, None])
    ]
    runner.run(streams, chunk=4, new_tokens=1)
    found: dict[str, tuple[float, float]] = {}
    for stream in streams:
        method = stream.adapter or "base"
        rows = torch.stack([stream.rows[i] for i in range(len(stream.prompt))])
        plain = peft_rows(base, None, stream.prompt)
        right = peft_rows(base, adapters.get(method), stream.prompt)
        found[method] = (_gap(rows, right), _gap(right, plain))
    return found


def main() -> int:
    columns = {}
    with tempfile.TemporaryDirectory() as directory:
        for arch in PLACES:
            columns[arch] = run_column(arch, Path(directory) / arch)
    print(f"{'method':16}" + "".join(f"{arch:>12}" for arch in columns))
    for method in ("base", *METHODS):
        cells = [
            f"{column[method][0]:.1e}" if method in column else "not in peft"
            for column in columns.values()
        ]
        print(f"{method:16}" + "".join(f"{cell:>12}" for cell in cells))
    worst = max(difference for column in columns.values() for difference, _ in column.values())
    print(f"largest difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    return int(worst >= TOLERANCE)


def _prompt(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    sys.exit(main())
