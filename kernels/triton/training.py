"""The low-rank part for training: y += scale * B (A x) for each row by its own adapter, and back.

Three kernels do everything, for factors that lie stacked along their ranks (kernels/stack.py).
_project: h = scale * x Aᵀ and g = scale * dy B, a program a segment of rows (all of one slot) and
tile of ranks. _accumulate: y += h Bᵀ and dx += g A, a program a segment and tile of columns.
_gradient: dA = gᵀ x and dBᵀ = hᵀ dy, a program a slot, tile of its ranks and tile of columns, over
all of the slot's rows: one program makes each number, so there are no atomics and the order of
programs does not matter. h and g are float32 [edited rows, max_rank], by the row's place in the
plan's order.

A tile has 64 rows, a whole segment, since training has many; factors are then read once a segment.
Nothing is read back to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.plan import Plan
from manylora.kernels.stack import RankStack, check_gradients, check_stacked
from manylora.kernels.triton import tiles
from manylora.kernels.triton.dot import dot, narrow


def add_low_rank_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    stack: RankStack,
    plan: Plan,
) -> None:
    """See `manylora.kernels.reference_training.add_low_rank_`."""
    check_stacked(y, x, a, bt, stack, plan.rows, plan.max_slot)
    if plan.empty or not stack.ranks:
        return
    _accumulate_rows(y, _projected(x, a, stack, plan), bt, stack, plan)


def low_rank_backward_(
    dx: torch.Tensor,
    da: torch.Tensor,
    dbt: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    stack: RankStack,
    plan: Plan,
) -> None:
    """See `manylora.kernels.reference_training.low_rank_backward_`."""
    check_gradients(dx, da, dbt, dy, x, a, bt, stack, plan.rows, plan.max_slot)
    if not stack.ranks:
        return
    hidden, d_hidden = _projected(x, a, stack, plan), _projected(dy, bt, stack, plan)
    if not plan.empty:
        _accumulate_rows(dx, d_hidden, a, stack, plan)
    _factor_gradient(da, d_hidden, x, stack, plan)
    _factor_gradient(dbt, hidden, dy, stack, plan)


def _projected(x: torch.Tensor, factor: torch.Tensor, stack: RankStack, plan: Plan) -> torch.Tensor:
    """scale * x factorᵀ, float32 [edited, max_rank]; lanes beyond a row's rank are not written."""
    hidden = torch.empty(plan.edited, stack.max_rank, dtype=torch.float32, device=x.device)
    if plan.empty:
        return hidden
    plan_of = tiles.project_tiles(x.dtype)
    _project[(plan.segments, triton.cdiv(stack.max_rank, plan_of.ranks))](
        hidden,
        x,
        factor,
        plan.words,
        stack.starts,
        stack.scale,
        x.stride(0),
        x.shape[1],
        stack.max_rank,
        ROWS=plan_of.rows,
        RANKS=plan_of.ranks,
        K=plan_of.k,
        num_warps=plan_of.warps,
        num_stages=plan_of.stages,
    )
    return hidden


def _accumulate_rows(
    y: torch.Tensor, hidden: torch.Tensor, factor: torch.Tensor, stack: RankStack, plan: Plan
) -> None:
    plan_of = tiles.training_tiles(y.dtype)
    _accumulate[(plan.segments, triton.cdiv(y.shape[1], plan_of.columns))](
        y,
        hidden,
        factor,
        plan.words,
        stack.starts,
        y.stride(0),
        y.shape[1],
        stack.max_rank,
        ROWS=plan_of.rows,
        COLUMNS=plan_of.columns,
        RANKS=plan_of.ranks,
        num_warps=plan_of.warps,
        num_stages=1,
    )


def _factor_gradient(
    gradient: torch.Tensor, hidden: torch.Tensor, x: torch.Tensor, stack: RankStack, plan: Plan
) -> None:
    plan_of = tiles.training_tiles(x.dtype)
    column_tiles = triton.cdiv(x.shape[1], plan_of.columns)
    _gradient[(stack.slots, column_tiles, triton.cdiv(stack.max_rank, plan_of.ranks))](
        gradient,
        hidden,
        x,
        plan.words,
        stack.starts,
        x.stride(0),
        x.shape[1],
        stack.max_rank,
        ROWS=plan_of.rows,
        COLUMNS=plan_of.columns,
        RANKS=plan_of.ranks,
        SEGMENTS=128,
        num_warps=plan_of.warps,
        num_stages=1,
    )


@triton.jit
def _project(
    hidden: tl.tensor,
    x: tl.tensor,
    factor: tl.tensor,
    words: tl.tensor,
    stack_starts: tl.tensor,
    scales: tl.tensor,
    x_stride: tl.tensor,
    size: tl.tensor,
    max_rank: tl.tensor,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    K: tl.constexpr,
) -> None:
    segment, first_rank = tl.program_id(0), tl.program_id(1) * RANKS
    rows, edited, segments = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    if segment >= segments:
        return
    order = words + 4 + rows
    starts = order + edited
    slot = tl.load(starts + segments + 1 + segment)
    start = tl.load(stack_starts + slot)
    rank = tl.load(stack_starts + slot + 1) - start
    if first_rank >= rank:
        return
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    r = first_rank + tl.arange(0, RANKS)
    factor += start.to(tl.int64) * size
    scale = tl.load(scales + slot)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        h = tl.zeros((ROWS, RANKS), tl.float32)
        for first_k in range(0, size, K):
            k = first_k + tl.arange(0, K)
            x_tile = tl.load(
                x + row[:, None] * x_stride + k[None, :],
                mask=(place < end)[:, None] & (k < size)[None, :],
                other=0.0,
            )
            factor_tile = tl.load(
                factor + r[None, :] * size + k[:, None],
                mask=(r < rank)[None, :] & (k < size)[:, None],
                other=0.0,
            )
            h = dot(x_tile, factor_tile, h)
        tl.store(
            hidden + place.to(tl.int64)[:, None] * max_rank + r[None, :],
            h * scale,
            mask=(place < end)[:, None] & (r < rank)[None, :],
        )


@triton.jit
def _accumulate(
    y: tl.tensor,
    hidden: tl.tensor,
    factor: tl.tensor,
    words: tl.tensor,
    stack_starts: tl.tensor,
    y_stride: tl.tensor,
    size: tl.tensor,
    max_rank: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    rows, edited, segments = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    if segment >= segments:
        return
    order = words + 4 + rows
    starts = order + edited
    slot = tl.load(starts + segments + 1 + segment)
    start = tl.load(stack_starts + slot)
    rank = tl.load(stack_starts + slot + 1) - start
    if rank == 0:
        return
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    factor += start.to(tl.int64) * size
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first_rank in range(0, rank, RANKS):
            r = first_rank + tl.arange(0, RANKS)
            h = tl.load(
                hidden + place.to(tl.int64)[:, None] * max_rank + r[None, :],
                mask=(place < end)[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            factor_tile = tl.load(
                factor + r[:, None] * size + column[None, :],
                mask=(r < rank)[:, None] & (column < size)[None, :],
                other=0.0,
            )
            total = dot(narrow(h, y.dtype.element_ty), factor_tile, total)
        at = y + row[:, None] * y_stride + column[None, :]
        ok = (place < end)[:, None] & (column < size)[None, :]
        before = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        tl.store(at, (before + total).to(y.dtype.element_ty), mask=ok)


@triton.jit
def _gradient(
    gradient: tl.tensor,
    hidden: tl.tensor,
    x: tl.tensor,
    words: tl.tensor,
    stack_starts: tl.tensor,
    x_stride: tl.tensor,
    size: tl.tensor,
    max_rank: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
) -> None:
    slot, first_rank = tl.program_id(0), tl.program_id(2) * RANKS
    start = tl.load(stack_starts + slot)
    rank = tl.load(stack_starts + slot + 1) - start
    if first_rank >= rank:
        return
    rows, edited, segments = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    order = words + 4 + rows
    starts = order + edited
    begin = tl.load(starts + _below(starts + segments + 1, segments, slot, SEGMENTS))
    end = tl.load(starts + _below(starts + segments + 1, segments, slot + 1, SEGMENTS))
    r = first_rank + tl.arange(0, RANKS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0).to(tl.int64)
        h = tl.load(
            hidden + place.to(tl.int64)[None, :] * max_rank + r[:, None],
            mask=(place < end)[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        x_tile = tl.load(
            x + row[:, None] * x_stride + column[None, :],
            mask=(place < end)[:, None] & (column < size)[None, :],
            other=0.0,
        )
        total = dot(narrow(h, x.dtype.element_ty), x_tile, total)
    tl.store(
        gradient + (start + r).to(tl.int64)[:, None] * size + column[None, :],
        total.to(gradient.dtype.element_ty),
        mask=(r < rank)[:, None] & (column < size)[None, :],
    )


@triton.jit
def _below(slots: tl.tensor, segments: tl.tensor, slot: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """How many of the segments, which are sorted by slot, have a lower slot."""
    count = 0
    for first in range(0, segments, N):
        at = first + tl.arange(0, N)
        lower = tl.load(slots + at, mask=at < segments, other=2147483647) < slot
        count += tl.sum(lower.to(tl.int32), 0)
    return count
