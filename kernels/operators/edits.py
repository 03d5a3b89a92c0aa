"""`manylora::apply_edits_`: the low-rank edits of a step. For inference: it has no gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from manylora.kernels.operators.plan import backend_of, plan_of
from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup

_group = functools.lru_cache(maxsize=1 << 14)(SliceGroup)


def apply_edits_(
    y: torch.Tensor,
    x: torch.Tensor,
    group: SliceGroup,
    pool: torch.Tensor,
    table: EditTable,
    plan: Plan,
    backend: str = "",
) -> None:
    """See `manylora.kernels.reference.apply_edits_`. Training uses `add_low_rank`."""
    _apply_edits_(
        y,
        x,
        pool,
        table.rank,
        table.scale,
        table.offsets,
        plan.words,
        group.modules,
        group.starts,
        group.sizes,
        table.max_rank(group),
        plan.edited,
        plan.segments,
        plan.max_slot,
        backend,
    )


@torch.library.custom_op("manylora::apply_edits_", mutates_args=("y",))
def _apply_edits_(
    y: torch.Tensor,
    x: torch.Tensor,
    pool: torch.Tensor,
    rank: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor,
    plan_words: torch.Tensor,
    modules: Sequence[int],
    starts: Sequence[int],
    sizes: Sequence[int],
    max_rank: int,
    edited: int,
    segments: int,
    max_slot: int,
    backend: str,
) -> None:
    group = _group(tuple(modules), tuple(starts), tuple(sizes))
    table = EditTable.on(rank, scale, offsets, max_rank)
    plan = plan_of(plan_words, edited, segments, max_slot)
    backend_of(backend, x).apply_edits_(y, x, group, pool, table, plan)


@_apply_edits_.register_fake
def _(y: torch.Tensor, x: torch.Tensor, *_: object) -> None:
    pass
