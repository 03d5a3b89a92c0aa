"""Adds scale * B h to a tile of y, where h is the sum of its split-K planes."""

from __future__ import annotations

import triton
import triton.language as tl

from manylora.kernels.triton.dot import dot, narrow


@triton.jit
def add_low_rank(
    total: tl.tensor,
    planes: tl.tensor,
    b: tl.tensor,
    place: tl.tensor,
    row_ok: tl.tensor,
    column: tl.tensor,
    column_ok: tl.tensor,
    rank: tl.tensor,
    max_rank: tl.tensor,
    b_stride: tl.tensor,
    scale: tl.tensor,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,
) -> tl.tensor:
    """total, float32 [rows, columns], plus the product.

    place: each row's first element of the planes. B lies [rank, b_stride]: see `pack_b`.
    Rows that are not ok, and ranks beyond the true one, are zeros on both sides. SHARED: the rows
    that are not ok belong to others, and zero times an infinite or NaN B would reach them: such
    columns leave the product and become NaN in the rows that are ok.
    """
    for first_rank in tl.range(0, rank, RANKS, num_stages=1):
        r = first_rank + tl.arange(0, RANKS)
        ok = row_ok[:, None] & (r < rank)[None, :]
        at = planes + place[:, None] + r[None, :]
        h = tl.load(at, mask=ok, other=0.0)
        for split in tl.range(1, SPLITS, num_stages=1):
            h += tl.load(at + split * max_rank, mask=ok, other=0.0)
        h = tl.where(ok, h * scale, 0.0)
        b_tile = tl.load(
            b + r[:, None] * b_stride + column[None, :],
            mask=(r < rank)[:, None] & column_ok[None, :],
            other=0.0,
        )
        if SHARED:
            finite = tl.abs(b_tile.to(tl.float32)) < float("inf")
            finite_b = tl.where(finite, b_tile, 0.0).to(b_tile.dtype)
            total = dot(narrow(h, b.dtype.element_ty), finite_b, total)
            broken = tl.min(finite.to(tl.int32), 0) == 0
            total += tl.where(row_ok[:, None] & broken[None, :], float("nan"), 0.0)
        else:
            total = dot(narrow(h, b.dtype.element_ty), b_tile, total)
    return total
