"""What the Triton kernels should take on a GPU: predicted from bytes, FLOPs and launches.

Nothing here was ever measured. A kernel is taken to reach the whole of whichever of memory and
matrix units it needs for longer, and each launch to cost what a launch costs from a CUDA graph's
predecessor. Peaks: an H100 SXM's data sheet (3.35 TB/s, 989 TFLOP/s dense bf16).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernels_attention import LLAMA3, SMOLLM2, Heads
from kernels_edits import Case

BANDWIDTH = 3.35e12
FLOPS = 989e12
LAUNCH = 2.5e-6
HALF, FLOAT = 2, 4
SPLITS, LEAST_CHUNK = 8, 256


@dataclass(slots=True, frozen=True)
class Work:
    """launches: 0 for what is part of another kernel."""

    nbytes: float
    flops: float
    launches: int

    @property
    def us(self) -> float:
        busy = max(self.nbytes / BANDWIDTH, self.flops / FLOPS)
        return (busy + self.launches * LAUNCH) * 1e6


def edits(case: Case) -> Work:
    """Shrink and expand: A, B and x once, y twice, h's split-K planes written and read."""
    splits = min(SPLITS, -(-case.in_size // LEAST_CHUNK))
    planes = 2 * case.rows * case.rank * splits * FLOAT
    rows = case.rows * (case.in_size + 2 * case.out_size) * HALF
    flops = 2 * case.rows * case.rank * (case.in_size + case.out_size)
    return Work(case.nbytes + rows + planes, flops, 2)


def base(rows: int, in_size: int, out_size: int) -> Work:
    """The base product by itself."""
    nbytes = (in_size * out_size + rows * (in_size + out_size)) * HALF
    return Work(nbytes, 2 * rows * in_size * out_size, 1)


def linear_with_edits(case: Case) -> Work:
    """Shrink, then the base product with the edits in its epilogue: y once."""
    low_rank, product = edits(case), base(case.rows, case.in_size, case.out_size)
    again = case.rows * 2 * case.out_size * HALF
    return Work(low_rank.nbytes - again + product.nbytes, low_rank.flops + product.flops, 2)


def training(case: Case) -> tuple[Work, Work]:
    """Forward (project, accumulate) and backward (project twice, accumulate, gradient twice)."""
    factors, x = case.nbytes, case.rows * case.in_size * HALF
    y, h = case.rows * case.out_size * HALF, case.rows * case.rank * FLOAT
    flops = 2 * case.rows * case.rank * (case.in_size + case.out_size)
    forward = Work(factors + x + 2 * y + 2 * h, flops, 2)
    backward = Work(4 * factors + 4 * x + 2 * y + 6 * h, 3 * flops, 5)
    return forward, backward


def attention(of: Heads, sequences: int, context: int) -> Work:
    """A decode step of a layer: every key and value once; attend and combine."""
    positions = sequences * context
    return Work(positions * of.position_bytes, 4 * positions * of.heads * of.head_dim, 2)


def small(rows: int, read: int, written: int) -> Work:
    """A small operation: so many elements of each row read and written."""
    return Work(rows * (read + written) * HALF, 0, 1)


@dataclass(slots=True, frozen=True)
class Predicted:
    kernel: str
    what: str
    work: Work


SIZES = (
    ("SmolLM2-135M", SMOLLM2, 576, 1536),
    ("Llama-3-8B", LLAMA3, 4096, 14336),
)


def others() -> Iterator[Predicted]:
    """What is not in the table of edits."""
    for model, of, hidden, inner in SIZES:
        for rows, adapters in ((256, 1), (2048, 8)):
            case = Case(rows, adapters, 16, hidden, inner)
            forward, backward = training(case)
            yield Predicted("base product alone", f"{model} {case}", base(rows, hidden, inner))
            yield Predicted("linear_with_edits", f"{model} {case}", linear_with_edits(case))
            yield Predicted("add_low_rank", f"{model} {case}", forward)
            yield Predicted("low_rank_backward", f"{model} {case}", backward)
        yield Predicted("paged_attention", f"{model} 32 x 2000", attention(of, 32, 2000))
        heads = (of.heads + 2 * of.kv_heads) * of.head_dim
        for rows in (32, 2048):
            shown = f"{model} {rows} rows"
            yield Predicted("rotary_write_kv", shown, small(rows, heads, heads))
            yield Predicted("residual + norm", shown, small(rows, 2 * hidden, 2 * hidden))
            yield Predicted("silu_mul", shown, small(rows, 2 * inner, inner))
