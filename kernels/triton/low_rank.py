"""The low-rank result of one tile: B h, where h is the sum of its split-K planes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low_rank(
    planes: tl.tensor,
    b: tl.tensor,
    place: tl.tensor,
    row_ok: tl.tensor,
    column: tl.tensor,
    column_ok: tl.tensor,
    rank: tl.tensor,
    max_rank: tl.tensor,
    b_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """float32 [ROWS, COLUMNS].

    place: each row's first element of the planes. B lies [rank, b_stride]: see `pack_b`.
    Lanes that are not ok, and ranks beyond the true one, are loaded as zeros on both sides.
    """
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first_rank in range(0, rank, RANKS):
        r = first_rank + tl.arange(0, RANKS)
        ok = row_ok[:, None] & (r < rank)[None, :]
        at = planes + place[:, None] + r[None, :]
        h = tl.load(at, mask=ok, other=0.0)
        for split in range(1, SPLITS):
            h += tl.load(at + split * max_rank, mask=ok, other=0.0)
        b_tile = tl.load(
            b + r[:, None] * b_stride + column[None, :],
            mask=(r < rank)[:, None] & column_ok[None, :],
            other=0.0,
        )
        total = _dot(h, b_tile, total)
    return total


@triton.jit
def _dot(h: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """h rounded once: to bfloat16, or for float16, whose range h may leave, to tf32."""
    if b.dtype == tl.bfloat16:
        total = tl.dot(h.to(tl.bfloat16), b, total)
    elif b.dtype == tl.float16:
        total = tl.dot(h, b.to(tl.float32), total, input_precision="tf32")
    else:
        total = tl.dot(h, b, total, input_precision="ieee")
    return total
