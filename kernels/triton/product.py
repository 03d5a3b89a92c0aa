"""linear_with_edits: the base product with each row's own edit in its epilogue, for prefill.

One program computes one tile of y = x Wᵀ + b within one slice, and while the tile is still in
registers applies the edits of its rows: it walks the slots that occur among them, the highest
first, and adds B h only to the rows of that slot. Rows lie as in the batch, so a tile may straddle
adapters without padding, and y is written once, rounded once. h comes from the shrink before it.

128 by 128, 64 columns of x at a time, keeps matrix units busy; 128 by 64 where the epilogue would
spill (`tiles.product_tiles`). Every slot of a tile costs a pass over its B; for decodes of many
adapters `apply_edits_` after a product of one's choice reads less. Programs that share columns of
W run after one another, eight row tiles at a time, so that W's tiles come from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup
from manylora.kernels.triton import tiles
from manylora.kernels.triton.dot import dot
from manylora.kernels.triton.edits import UNIT, check_fit, load_vector
from manylora.kernels.triton.low_rank import add_low_rank
from manylora.kernels.triton.scale_inputs import scale_inputs
from manylora.kernels.triton.shrink import shrink
from manylora.kernels.triton.slices import TILE_WORDS, is_aligned, tile_words


def linear_with_edits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    group: SliceGroup,
    pool: torch.Tensor,
    table: EditTable,
    plan: Plan,
) -> torch.Tensor:
    """`weight` (in_scale * x) + `bias`, edited as by `apply_edits_`: [rows, out].

    x: [rows, in]. weight: [out, in], rows contiguous. bias: [out] or None. The group's slices
    cover all of out. The base result is not rounded before it is edited.

    Raises:
        ValueError: tensors that do not fit each other, the group, the table or the plan.
    """
    rows, in_size = x.shape
    out_size = weight.shape[0]
    if (
        weight.shape[1] != in_size
        or weight.stride(1) != 1
        or weight.dtype != x.dtype
        or sum(group.sizes) != out_size
        or not (bias is None or (bias.shape == (out_size,) and bias.is_contiguous()))
    ):
        raise ValueError(
            f"linear_with_edits: wanted weight [out, {in_size}] in x's dtype, bias [out] or none, "
            f"slices that cover out; found weight {tuple(weight.shape)} {weight.stride()} "
            f"{weight.dtype}, bias {None if bias is None else tuple(bias.shape)}, {group}"
        )
    y = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    check_fit(y, x, group, pool, table, plan)
    if rows == 0:
        return y
    plan_of = tiles.product_tiles(x.dtype, tiles.target())
    planes = shrink(x, group, pool, table, plan)
    words = tile_words(group, plan_of.columns, x.device)
    row_tiles = triton.cdiv(rows, plan_of.rows)
    scaled = scale_inputs(x, group, pool, table, plan)
    _product[(row_tiles * len(words),)](
        y,
        scaled,
        weight,
        bias,
        planes,
        pool,
        plan.row_slot,
        words,
        table.rank,
        table.scale,
        table.offsets,
        scaled.stride(0),
        weight.stride(0),
        y.stride(0),
        rows,
        in_size,
        len(words),
        table.modules,
        planes.shape[3],
        ROWS=plan_of.rows,
        COLUMNS=plan_of.columns,
        K=plan_of.k,
        RANKS=plan_of.ranks,
        SPLITS=planes.shape[2],
        TILE_WORDS=TILE_WORDS,
        UNIT=UNIT,
        ALIGNED=is_aligned(group),
        num_warps=plan_of.warps,
        num_stages=plan_of.stages,
    )
    return y


_TOGETHER = tl.constexpr(8)


@triton.jit(do_not_specialize=["rows"])
def _product(
    y: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    base_bias: tl.tensor,
    planes: tl.tensor,
    pool: tl.tensor,
    row_slot: tl.tensor,
    tile_words: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    y_stride: tl.tensor,
    rows: tl.tensor,
    in_size: tl.tensor,
    column_tiles: tl.tensor,
    modules: tl.tensor,
    max_rank: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    row_tile, column_tile = _place(tl.program_id(0), tl.cdiv(rows, ROWS), column_tiles)
    tile = tile_words + column_tile * TILE_WORDS
    part, module, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    size, first_column = tl.load(tile + 3), tl.load(tile + 4)
    first_column = tl.multiple_of(first_column, COLUMNS)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    first_row = row_tile * ROWS
    row = tl.arange(0, ROWS)
    row_ok = row < rows - first_row
    x += first_row.to(tl.int64) * x_stride
    y += first_row.to(tl.int64) * y_stride + start + first_column
    weight += (start + first_column).to(tl.int64) * weight_stride
    planes += (part * rows + first_row).to(tl.int64) * (SPLITS * max_rank)
    within = tl.arange(0, COLUMNS)
    column = first_column + within
    column_ok = column < size

    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first_k in range(0, in_size, K):
        k = first_k + tl.arange(0, K)
        x_tile = tl.load(
            x + row[:, None] * x_stride + k[None, :],
            mask=row_ok[:, None] & (k < in_size)[None, :],
            other=0.0,
        )
        weight_tile = tl.load(
            weight + within[None, :] * weight_stride + k[:, None],
            mask=column_ok[None, :] & (k < in_size)[:, None],
            other=0.0,
        )
        result = dot(x_tile, weight_tile, result)
    if base_bias is not None:
        base = tl.load(base_bias + start + column, mask=column_ok, other=0.0)
        result += base.to(tl.float32)[None, :]

    slots = tl.load(row_slot + first_row + row, mask=row_ok, other=-1)
    slot = tl.max(slots, 0)
    for _ in tl.range(0, _distinct(slots), num_stages=1):
        entry = slot.to(tl.int64) * modules + module
        mine = (slots == slot)[:, None]
        out_scale = load_vector(pool, tl.load(offsets + entry * 5 + 3), column, column_ok, 1.0)
        # no select of `result` itself: Triton 3.7 cannot compile one before a product for sm_100
        result *= tl.where(mine, out_scale[None, :], 1.0)
        rank = tl.load(ranks + entry)
        result = add_low_rank(
            result,
            planes,
            pool + tl.multiple_of(tl.load(offsets + entry * 5 + 1), 16),
            row * (SPLITS * max_rank),
            slots == slot,
            column,
            column_ok,
            rank,
            max_rank,
            tl.multiple_of((size + UNIT - 1) // UNIT * UNIT, UNIT),
            tl.load(scales + entry),
            RANKS,
            SPLITS,
            True,
        )
        bias = load_vector(pool, tl.load(offsets + entry * 5 + 4), column, column_ok, 0.0)
        result += tl.where(mine, bias[None, :], 0.0)
        slot = tl.max(tl.where(slots < slot, slots, -1), 0)
    at = y + row[:, None] * y_stride + within[None, :]
    tl.store(at, result.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _distinct(slots: tl.tensor) -> tl.tensor:
    """How many different slots there are that are not negative."""
    count = 0
    slot = tl.max(slots, 0)
    while slot >= 0:
        count += 1
        slot = tl.max(tl.where(slots < slot, slots, -1), 0)
    return count


@triton.jit
def _place(program: tl.tensor, row_tiles: tl.tensor, column_tiles: tl.tensor) -> tl.tensor:
    """Row and column tile of a program."""
    band = program // (_TOGETHER * column_tiles)
    height = tl.minimum(row_tiles - band * _TOGETHER, _TOGETHER)
    within = program % (_TOGETHER * column_tiles)
    return band * _TOGETHER + within % height, within // height
