"""Shrink: h = A x for every edited row, by the row's own A, in split-K planes.

One program has one segment of rows (all of one slot), one slice and one chunk of x's columns. It
walks the segment's rows in tiles and the adapter's true rank in steps, and writes its partial sums
to a plane of its own: planes float32 [slices, rows, splits, max_rank], by the row's place in the
batch. Who reads h adds the planes while loading them, so nothing is cleared before and no two
programs write to one place: results do not depend on the order of programs.

A lies row-major [rank, in]: k is contiguous in both operands. A tile has 16 rows, the least that
the matrix units take: in decode a segment is mostly one row, and what costs is A's bytes, which
are read once. 32 ranks, since lanes beyond the true rank are masked and cost no bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup
from manylora.kernels.triton import tiles
from manylora.kernels.triton.dot import dot
from manylora.kernels.triton.slices import module_words


def shrink(
    x: torch.Tensor, group: SliceGroup, pool: torch.Tensor, table: EditTable, plan: Plan
) -> torch.Tensor:
    """Planes float32 [slices, rows, splits, max_rank]; what belongs to no edit is not written.

    x: [rows, in], rows contiguous.
    """
    rows, in_size = x.shape
    on = tiles.target()
    plan_of = tiles.shrink_tiles(in_size, x.dtype, on)
    slices = len(group.modules)
    max_rank = tiles.round_up(table.max_rank(group), 16)
    shape = (slices, rows, plan_of.splits, max_rank)
    planes = torch.empty(shape, dtype=torch.float32, device=x.device)
    if planes.numel():
        _shrink[(plan.segments, slices, plan_of.splits)](
            planes,
            x,
            pool,
            plan.words,
            module_words(group, x.device),
            table.rank,
            table.offsets,
            x.stride(0),
            in_size,
            table.modules,
            max_rank,
            ROWS=plan_of.rows,
            RANKS=plan_of.ranks,
            K=plan_of.k,
            CHUNK=plan_of.chunk,
            SPLITS=plan_of.splits,
            num_warps=plan_of.warps,
            num_stages=plan_of.stages,
        )
    return planes


@triton.jit
def _shrink(
    planes: tl.tensor,
    x: tl.tensor,
    pool: tl.tensor,
    words: tl.tensor,
    slice_modules: tl.tensor,
    ranks: tl.tensor,
    offsets: tl.tensor,
    x_stride: tl.tensor,
    in_size: tl.tensor,
    modules: tl.tensor,
    max_rank: tl.tensor,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    segment, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, edited, segments = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    if segment >= segments:
        return
    order = words + 4 + rows
    starts = order + edited
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    slot = tl.load(starts + segments + 1 + segment).to(tl.int64)
    entry = slot * modules + tl.load(slice_modules + part)
    rank = tl.load(ranks + entry)
    a = pool + tl.multiple_of(tl.load(offsets + entry * 5), 16)

    for first in range(begin, end, ROWS):
        lane = first + tl.arange(0, ROWS)
        row = tl.load(order + lane, mask=lane < end, other=0).to(tl.int64)
        for first_rank in range(0, rank, RANKS):
            r = first_rank + tl.arange(0, RANKS)
            h = tl.zeros((ROWS, RANKS), tl.float32)
            for step in range(0, CHUNK, K):
                k = split * CHUNK + step + tl.arange(0, K)
                x_tile = tl.load(
                    x + row[:, None] * x_stride + k[None, :],
                    mask=(lane < end)[:, None] & (k < in_size)[None, :],
                    other=0.0,
                )
                a_tile = tl.load(
                    a + r[None, :] * in_size + k[:, None],
                    mask=(r < rank)[None, :] & (k < in_size)[:, None],
                    other=0.0,
                )
                h = dot(x_tile, a_tile, h)
            place = ((part * rows + row) * SPLITS + split) * max_rank
            tl.store(
                planes + place[:, None] + r[None, :],
                h,
                mask=(lane < end)[:, None] & (r < rank)[None, :],
            )
