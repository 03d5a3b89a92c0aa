"""The matrix: every served PEFT method on every architecture, all of one in one mixed batch.

`python -m manylora_testing.matrix` prints the largest difference to peft in each cell, and exits 0
only where all hold.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from manylora import kernels
from manylora.server.engine.model import AdaptedModel, load_model
from manylora_testing.encoder_column import (
    ENCODER,
    encoder_gaps,
    make_encoder_column,
    run_encoder_column,
)
from manylora_testing.flat import FlatRunner, Stream
from manylora_testing.methods import (
    INVOCATION,
    METHODS,
    PLACES,
    make_method,
    methods_of,
    peft_rows,
)
from manylora_testing.models import VOCAB, tiny_model

DECODERS = tuple(arch for arch in PLACES if arch != ENCODER)
TOLERANCE = 1e-4  # of float32 logits of order one
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Column:
    """One architecture with an adapter of every method; the base in float32."""

    path: Path
    base: Any
    adapters: Mapping[str, Path]


def make_column(
    arch: str, directory: Path, dtype: torch.dtype = torch.float32, **sizes: int
) -> Column:
    """dtype: of the checkpoint's weights. sizes: see `tiny_model`."""
    made = _read(tiny_model(arch, directory / "made", **sizes), dtype)
    path = directory / "base"
    made.save_pretrained(path)
    base = made.float()
    methods = methods_of(arch)
    return Column(
        path,
        base,
        {method: make_method(method, arch, base, directory / method) for method in methods},
    )


def run_column(
    column: Column, *, backend: str | None = None, dtype: str = "float32", fused: bool = True
) -> list[Stream]:
    """All methods and rows of the base, served in one flat batch of chunks and decodes."""
    chosen = kernels.select(CPU, backend)
    model = load_model(column.path, dtype, CPU, chosen, fused=fused)
    streams = column_streams(column)
    column_runner(column, model, chosen).run(streams, chunk=4, new_tokens=1)
    return streams


def column_runner(column: Column, model: AdaptedModel, backend: kernels.Backend) -> FlatRunner:
    """With blocks for one stream of each method."""
    return FlatRunner(model, column.adapters, backend, blocks=2 * len(column.adapters) + 8)


def column_streams(column: Column) -> list[Stream]:
    """One of the base and of each method."""
    generator = torch.Generator().manual_seed(5)
    return [
        Stream(method, _prompt(generator, 9 + i % 9), watched=True, starts_at=i % 3)
        for i, method in enumerate([None, *column.adapters])
    ]


def gaps(column: Column, streams: Sequence[Stream]) -> Mapping[str, tuple[float, float]]:
    """method, or "base" → largest difference of logits to peft's; and of peft's to the base's."""
    found: dict[str, tuple[float, float]] = {}
    for stream in streams:
        plain = peft_rows(column.base, None, stream.prompt)
        right = peft_rows(column.base, column.adapters.get(stream.adapter or ""), stream.prompt)
        gap, size = (float((rows - right).abs().max()) for rows in (_rows(stream), plain))
        found[stream.adapter or "base"] = (gap, size)
    return found


def errors(column: Column, streams: Sequence[Stream]) -> Mapping[str, tuple[float, float]]:
    """method, or "base" → root mean square of the served logits' difference to peft's in float32;
    and of peft's own in the checkpoint's dtype."""
    own = _read(column.path, "auto")
    found: dict[str, tuple[float, float]] = {}
    for stream in streams:
        adapter = column.adapters.get(stream.adapter or "")
        right = peft_rows(column.base, adapter, stream.prompt)
        theirs = peft_rows(own, adapter, stream.prompt).float()
        ours, error = (
            float((rows - right).square().mean().sqrt()) for rows in (_rows(stream), theirs)
        )
        found[stream.adapter or "base"] = (ours, error)
    return found


def main() -> int:
    columns = {}
    with tempfile.TemporaryDirectory() as directory:
        for arch in DECODERS:
            column = make_column(arch, Path(directory) / arch)
            columns[arch] = gaps(column, run_column(column))
        encoder = make_encoder_column(Path(directory) / ENCODER)
        asked, _ = asyncio.run(run_encoder_column(encoder))
        columns[ENCODER] = encoder_gaps(encoder, asked)
    print(f"{'method':16}" + "".join(f"{arch:>12}" for arch in columns))
    for method in ("base", *METHODS):
        cells = [
            f"{column[method][0]:.1e}" if method in column else "-" for column in columns.values()
        ]
        print(f"{method:16}" + "".join(f"{cell:>12}" for cell in cells))
    differences = [gap for column in columns.values() for gap, _ in column.values()]
    print(f"largest difference {max(differences):.1e}, allowed {TOLERANCE:.0e}")
    return int(not all(gap < TOLERANCE for gap in differences))  # NaN is not less


def _prompt(generator: torch.Generator, length: int) -> list[int]:
    """Random tokens; from the fifth on, what invokes aLoRA."""
    prompt: list[int] = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    return [*prompt[:4], *INVOCATION, *prompt[6:]]


def _rows(stream: Stream) -> torch.Tensor:
    return torch.stack([stream.rows[i] for i in range(len(stream.prompt))])


def _read(path: Path, dtype: Any) -> Any:
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


if __name__ == "__main__":
    sys.exit(main())
