"""The low-rank part for training on the CPU: argument checks and the calls into C++."""

from __future__ import annotations

import torch

from manylora.kernels.cpu import library
from manylora.kernels.plan import Plan
from manylora.kernels.stack import RankStack, check_gradients, check_stacked

_DTYPES = library.DTYPES

_forward = library.kernel("add_low_rank", "16q")
_backward = library.kernel("low_rank_backward", "20q")


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
    hidden = x.new_empty((plan.edited, stack.max_rank), dtype=torch.float32)
    _forward(
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        *_shared(x, a, bt, hidden, stack, plan),
    )


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
    hidden = x.new_empty((2, plan.edited, stack.max_rank), dtype=torch.float32)
    _backward(
        dx.data_ptr(),
        dx.stride(0),
        da.data_ptr(),
        dbt.data_ptr(),
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        *_shared(x, a, bt, hidden, stack, plan),
    )


def _shared(
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    hidden: torch.Tensor,
    stack: RankStack,
    plan: Plan,
) -> tuple[int, ...]:
    """What both kernels are given at the end."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"low-rank: found {x.dtype}; wanted one of {', '.join(map(str, _DTYPES))}")
    return (
        a.data_ptr(),
        bt.data_ptr(),
        a.shape[1],
        bt.shape[1],
        hidden.data_ptr(),
        stack.slots,
        stack.max_rank,
        stack.starts.data_ptr(),
        stack.scale.data_ptr(),
        plan.address,
        _DTYPES[x.dtype],
        _DTYPES[a.dtype],
    )
