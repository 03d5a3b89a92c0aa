"""The low-rank result of one tile: B h, where h is the sum of its split-K planes."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def low_rank(
    planes: Any,
    b: Any,
    place: Any,
    row_ok: Any,
    column: Any,
    column_ok: Any,
    rank: Any,
    max_rank: Any,
    b_stride: Any,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> Any:
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
        for split in tl.static_range(1, SPLITS):
            h += tl.load(at + split * max_rank, mask=ok, other=0.0)
        b_tile = tl.load(
            b + r[:, None] * b_stride + column[None, :],
            mask=(r < rank)[:, None] & column_ok[None, :],
            other=0.0,
        )
        total = _dot(h, b_tile, total)
    return total


@triton.jit
def _dot(h: Any, b: Any, total: Any) -> Any:
    """h rounded once: to bfloat16, or for float16, whose range h may leave, to tf32."""
    if b.dtype == tl.bfloat16:
        return tl.dot(h.to(tl.bfloat16), b, total)
    if b.dtype == tl.float16:
        return tl.dot(h, b.to(tl.float32), total, input_precision="tf32")
    return tl.dot(h, b, total, input_precision="ieee")
