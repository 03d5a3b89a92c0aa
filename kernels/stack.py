"""Trainable factors of many adapters on one module: stacked along their ranks, nothing padded.

A of every slot [rank, in] lies in one matrix [ranks, in], the transposed B of every slot
[rank, out] in another, [ranks, out]: two parameters for an optimizer, whatever the number of
adapters. Both products with them, and both gradients, then run along contiguous rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True, slots=True, eq=False)
class RankStack:
    """Which rows of the stacked factors each slot has, and its scale.

    Attributes:
        slots: how many adapters.
        ranks: rows of the stacked factors, the sum of all ranks.
        max_rank: the highest of them.
        starts: int32 [slots + 1] on the device; slot s has rows starts[s]:starts[s + 1].
        scale: float32 [slots] on the device, factor of the low-rank part.
    """

    slots: int
    ranks: int
    max_rank: int
    starts: torch.Tensor
    scale: torch.Tensor


def make_stack(
    ranks: Sequence[int], scales: Sequence[float], device: torch.device | str = "cpu"
) -> RankStack:
    """The stack of adapters with these ranks; rank 0 is one that leaves the module alone.

    Raises:
        ValueError: another number of scales than of ranks, a negative rank, a scale that is not
            finite.
    """
    if (
        len(ranks) != len(scales)
        or min(ranks, default=0) < 0
        or not all(map(math.isfinite, scales))
    ):
        raise ValueError(
            "stack: wanted ranks that are not negative and as many finite scales; "
            f"found ranks {tuple(ranks)}, scales {tuple(scales)}"
        )
    starts = tuple(accumulate(ranks, initial=0))
    return RankStack(
        slots=len(ranks),
        ranks=starts[-1],
        max_rank=max(ranks, default=0),
        starts=torch.tensor(starts, dtype=torch.int32).to(device),
        scale=torch.tensor(tuple(scales), dtype=torch.float32).to(device),
    )


def stack_factors(
    factors: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [ranks, in] and Bᵀ [ranks, out] of (A [rank, in], B [out, rank]) of each slot.

    torch's own operations: gradients reach the factors.
    """
    pairs = tuple(factors)
    return torch.cat([a for a, _ in pairs]), torch.cat([b.T for _, b in pairs])


def check_stacked(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    stack: RankStack,
    rows: int,
    max_slot: int,
) -> None:
    """Raises ValueError for tensors, stack and plan (its rows, its highest slot) that do not fit.

    y stands for every tensor of its shape, x likewise.
    """
    if (
        x.dim() != 2
        or y.dim() != 2
        or x.shape[0] != rows
        or y.shape[0] != rows
        or x.stride(1) != 1
        or y.stride(1) != 1
        or a.shape != (stack.ranks, x.shape[1])
        or bt.shape != (stack.ranks, y.shape[1])
        or not (a.is_contiguous() and bt.is_contiguous())
        or y.dtype != x.dtype
        or not (a.dtype == bt.dtype and a.dtype in (x.dtype, torch.float32))
        or max_slot >= stack.slots
    ):
        raise ValueError(
            "low-rank: wanted x [rows, in] and y [rows, out] of one dtype with contiguous rows, "
            "contiguous a [ranks, in] and bt [ranks, out] of that dtype or float32, rows and slots "
            f"that exist; found y {tuple(y.shape)} {y.stride()} {y.dtype}, x {tuple(x.shape)} "
            f"{x.stride()} {x.dtype}, a {tuple(a.shape)} {a.dtype}, "
            f"bt {tuple(bt.shape)} {bt.dtype}, "
            f"a stack of {stack.ranks} ranks and {stack.slots} slots, "
            f"a plan of {rows} rows and slots to {max_slot}"
        )


def check_gradients(
    dx: torch.Tensor,
    da: torch.Tensor,
    dbt: torch.Tensor,
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    bt: torch.Tensor,
    stack: RankStack,
    rows: int,
    max_slot: int,
) -> None:
    """`check_stacked` for a backward: the gradients must be like what they are gradients of."""
    check_stacked(dy, x, a, bt, stack, rows, max_slot)
    check_stacked(dy, dx, da, dbt, stack, rows, max_slot)
    if dx.shape != x.shape or da.dtype != a.dtype:
        raise ValueError(
            f"low-rank: wanted dx {tuple(x.shape)} and da {a.dtype}; "
            f"found {tuple(dx.shape)} and {da.dtype}"
        )
