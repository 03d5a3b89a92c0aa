"""`manylora::add_low_rank`: the low-rank part of many adapters in one batch, with its gradients."""

from __future__ import annotations

from typing import Any

import torch

from manylora.kernels.operators.plan import backend_of, plan_of
from manylora.kernels.plan import Plan
from manylora.kernels.stack import RankStack


def add_low_rank(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    stack: RankStack,
    plan: Plan,
    backend: str = "",
) -> torch.Tensor:
    """y[i] + scale * B (A x[i]), by row i's own adapter: [rows, out]. Differentiable once.

    Gradients reach y, x, a and bt; an adapter's are those it would get in a batch of its own.
    For shapes, dtypes and errors see `manylora.kernels.reference_training.add_low_rank_`; the
    reference also takes float64.
    """
    numbers = (stack.max_rank, plan.edited, plan.segments, plan.max_slot)
    result: torch.Tensor = _add_low_rank(
        y, x, a, bt, stack.starts, stack.scale, plan.words, *numbers, backend
    )
    return result


@torch.library.custom_op("manylora::add_low_rank", mutates_args=())
def _add_low_rank(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    starts: torch.Tensor,
    scale: torch.Tensor,
    plan_words: torch.Tensor,
    max_rank: int,
    edited: int,
    segments: int,
    max_slot: int,
    backend: str,
) -> torch.Tensor:
    result = y.clone(memory_format=torch.contiguous_format)
    stack = RankStack(len(scale), len(a), max_rank, starts, scale)
    plan = plan_of(plan_words, edited, segments, max_slot)
    backend_of(backend, x).add_low_rank_(result, x.contiguous(), a, bt, stack, plan)
    return result


@_add_low_rank.register_fake
def _(y: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("manylora::low_rank_backward", mutates_args=())
def _low_rank_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    starts: torch.Tensor,
    scale: torch.Tensor,
    plan_words: torch.Tensor,
    max_rank: int,
    edited: int,
    segments: int,
    max_slot: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    da, dbt = torch.empty_like(a), torch.empty_like(bt)
    stack = RankStack(len(scale), len(a), max_rank, starts, scale)
    plan = plan_of(plan_words, edited, segments, max_slot)
    backend_of(backend, x).low_rank_backward_(
        dx, da, dbt, dy.contiguous(), x.contiguous(), a, bt, stack, plan
    )
    return dx, da, dbt


@_low_rank_backward.register_fake
def _(
    dy: torch.Tensor,  # noqa: ARG001
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(a), torch.empty_like(bt)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    _, *tensors = inputs[:7]
    ctx.save_for_backward(*tensors)
    ctx.others = inputs[7:]


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, da, dbt = _low_rank_backward(dy, *ctx.saved_tensors, *ctx.others)
    return dy, dx, da, dbt, *(None,) * 8


_add_low_rank.register_autograd(_gradients, setup_context=_remember)
