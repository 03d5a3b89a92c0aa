"""The low-rank part for training, forward and backward, in plain torch: the kernels' definition.

Computed in float64 and rounded once, like the edits. float64 tensors go through unrounded.
"""

from __future__ import annotations

import torch

from manylora.kernels.plan import Plan
from manylora.kernels.stack import RankStack, check_gradients, check_stacked


def add_low_rank_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    stack: RankStack,
    plan: Plan,
) -> None:
    """y[i] += scale * B (A x[i]), by row i's own adapter, in place.

    Rows without a slot, or whose adapter has rank 0, are not touched.

    Args:
        y: [rows, out]; float32, float16 or bfloat16.
        x: [rows, in], same dtype.
        a: [ranks, in], stacked; the same dtype or float32.
        bt: [ranks, out], the transposed B, stacked; a's dtype.
        stack: which rows of a and bt each slot has.
        plan: the rows of every slot.

    Raises:
        ValueError: tensors that do not fit each other, the stack or the plan.
    """
    check_stacked(y, x, a, bt, stack, plan.rows, plan.max_slot)
    for rows, own, scale in _slots(stack, plan):
        hidden = x[rows].double() @ a[own].double().T
        y[rows] = (y[rows].double() + scale * (hidden @ bt[own].double())).to(y.dtype)


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
    """The gradients of `add_low_rank_`, from dy [rows, out], the gradient of its result.

    Args:
        dx: [rows, in]; scale * Aᵀ (Bᵀ dy[i]) is added to it, as the edit is to y.
        da: like a. Overwritten, with zeros for slots without rows.
        dbt: like bt. Overwritten likewise.
        dy, x, a, bt, stack, plan: as in `add_low_rank_`.

    Raises:
        ValueError: tensors that do not fit each other, the stack or the plan.
    """
    check_gradients(dx, da, dbt, dy, x, a, bt, stack, plan.rows, plan.max_slot)
    da.zero_()
    dbt.zero_()
    for rows, own, scale in _slots(stack, plan):
        own_x, own_a, own_bt = x[rows].double(), a[own].double(), bt[own].double()
        own_dy = scale * dy[rows].double()
        d_hidden = own_dy @ own_bt.T
        dx[rows] = (dx[rows].double() + d_hidden @ own_a).to(dx.dtype)
        da[own] = (d_hidden.T @ own_x).to(da.dtype)
        dbt[own] = ((own_x @ own_a.T).T @ own_dy).to(dbt.dtype)


def _slots(stack: RankStack, plan: Plan) -> list[tuple[torch.Tensor, slice, float]]:
    """Row indices, rows of the stack and scale of each slot that has both."""
    starts, scales = stack.starts.tolist(), stack.scale.tolist()
    return [
        (
            (plan.row_slot == slot).nonzero()[:, 0],
            slice(starts[slot], starts[slot + 1]),
            scales[slot],
        )
        for slot in sorted(set(plan.seg_slot.tolist()))
        if starts[slot] < starts[slot + 1]
    ]
