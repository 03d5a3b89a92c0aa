"""apply_edits_: shrink, then expand, which adds B h and the other parts of each row's edit into y.

One program of the expand has one segment of rows (all of one slot) and one tile of one slice's
columns; it adds up the split-K planes of h while loading them. B lies transposed in the pool,
[rank, out], so that a tile of it is contiguous along the columns whatever the rank is. 16 rows as
in the shrink. 128 columns: y's lines of 256 bytes, and enough programs from one adapter's 4,096.

Both grids cover the plan's segments; a captured graph takes a plan with the most segments that can
be (one a row): programs beyond the real number, which they read from the plan, end at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from manylora.kernels.packing import packed_in_turn
from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup
from manylora.kernels.triton import tiles
from manylora.kernels.triton.low_rank import add_low_rank
from manylora.kernels.triton.shrink import shrink
from manylora.kernels.triton.slices import TILE_WORDS, is_aligned, tile_words

UNIT = 16


def pack_a(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A [r, in] as the kernels read it, flat: row-major."""
    return a.to(dtype).flatten()


def pack_b(b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B [out, r] as the kernels read it, flat: [r, out], out padded with zeros to 16."""
    out, rank = b.shape
    packed = torch.zeros(rank, tiles.round_up(out, UNIT), dtype=dtype, device=b.device)
    packed[:, :out] = b.T
    return packed.flatten()


def pack_factors(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, before: int
) -> tuple[torch.Tensor, np.ndarray]:
    """See `manylora.kernels.reference.pack_factors`."""
    return packed_in_turn(factors, dtype, before, pack_a, pack_b)


def apply_edits_(
    y: torch.Tensor,
    x: torch.Tensor,
    group: SliceGroup,
    pool: torch.Tensor,
    table: EditTable,
    plan: Plan,
) -> None:
    """See `manylora.kernels.reference.apply_edits_`.

    Raises:
        ValueError: tensors that do not fit each other, the group, the table or the plan.
    """
    if plan.empty:
        return
    check_fit(y, x, group, pool, table, plan)
    plan_of = tiles.expand_tiles(x.dtype)
    planes = shrink(x, group, pool, table, plan)
    words = tile_words(group, plan_of.columns, x.device)
    _expand[(plan.segments, len(words))](
        y,
        planes,
        pool,
        plan.words,
        words,
        table.rank,
        table.scale,
        table.offsets,
        y.stride(0),
        table.modules,
        planes.shape[3],
        ROWS=plan_of.rows,
        COLUMNS=plan_of.columns,
        RANKS=plan_of.ranks,
        SPLITS=planes.shape[2],
        TILE_WORDS=TILE_WORDS,
        UNIT=UNIT,
        ALIGNED=is_aligned(group),
        num_warps=plan_of.warps,
        num_stages=1,
    )


def check_fit(
    y: torch.Tensor,
    x: torch.Tensor,
    group: SliceGroup,
    pool: torch.Tensor,
    table: EditTable,
    plan: Plan,
) -> None:
    """Raises ValueError for tensors, group, table and plan that do not fit together."""
    if (
        x.shape[0] != plan.rows
        or y.shape[0] != plan.rows
        or y.shape[1] < group.end
        or x.stride(1) != 1
        or y.stride(1) != 1
        or not x.dtype == y.dtype == pool.dtype
        or plan.max_slot >= table.slots
        or group.max_module >= table.modules
    ):
        raise ValueError(
            "apply_edits_: wanted x [rows, in] and y [rows, out] with contiguous rows, one dtype "
            "with the pool, rows as in the plan, columns, modules and slots that exist; "
            f"found y {tuple(y.shape)} {y.stride()} {y.dtype}, x {tuple(x.shape)} {x.stride()} "
            f"{x.dtype}, pool {pool.dtype}, plan of {plan.rows} rows and slots to {plan.max_slot}, "
            f"table of {table.slots} slots and {table.modules} modules, {group}"
        )


@triton.jit
def _expand(
    y: tl.tensor,
    planes: tl.tensor,
    pool: tl.tensor,
    words: tl.tensor,
    tile_words: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    y_stride: tl.tensor,
    modules: tl.tensor,
    max_rank: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    rows, edited, segments = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    if segment >= segments:
        return
    tile = tile_words + tl.program_id(1) * TILE_WORDS
    part, module = tl.load(tile), tl.load(tile + 1)
    order = words + 4 + rows
    starts = order + edited
    slot = tl.load(starts + segments + 1 + segment).to(tl.int64)
    entry = slot * modules + module
    rank = tl.load(ranks + entry)
    out_scale_at, bias_at = tl.load(offsets + entry * 5 + 3), tl.load(offsets + entry * 5 + 4)
    if (rank == 0) & (out_scale_at < 0) & (bias_at < 0):
        return

    start, size, first_column = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    column = tl.multiple_of(first_column, COLUMNS) + tl.arange(0, COLUMNS)
    column_ok = column < size
    out_scale = load_vector(pool, out_scale_at, column, column_ok, 1.0)
    bias = load_vector(pool, bias_at, column, column_ok, 0.0)
    scale = tl.load(scales + entry)
    b = pool + tl.multiple_of(tl.load(offsets + entry * 5 + 1), 16)
    b_stride = tl.multiple_of((size + UNIT - 1) // UNIT * UNIT, UNIT)

    end = tl.load(starts + segment + 1)
    for first in range(tl.load(starts + segment), end, ROWS):
        lane = first + tl.arange(0, ROWS)
        row = tl.load(order + lane, mask=lane < end, other=0).to(tl.int64)
        at = y + row[:, None] * y_stride + (start + column)[None, :]
        ok = (lane < end)[:, None] & column_ok[None, :]
        before = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        after = add_low_rank(
            before * out_scale[None, :],
            planes,
            b,
            (part * rows + row) * (SPLITS * max_rank),
            lane < end,
            column,
            column_ok,
            rank,
            max_rank,
            b_stride,
            scale,
            RANKS,
            SPLITS,
            False,
        )
        after += bias[None, :]
        tl.store(at, after.to(y.dtype.element_ty), mask=ok)


@triton.jit
def load_vector(
    pool: tl.tensor, offset: tl.tensor, index: tl.tensor, ok: tl.tensor, absent: tl.constexpr
) -> tl.tensor:
    """A float32 vector that lies in the pool's bytes; `absent` where its offset is negative."""
    address = (pool + tl.multiple_of(offset, 16)).to(tl.pointer_type(tl.float32))
    return tl.load(address + index, mask=ok & (offset >= 0), other=absent)
