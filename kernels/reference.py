"""The definition of every kernel in plain torch: slow, obviously right, the oracle of the tests.

Edits are computed in float64 and rounded once, so that a row's result does not depend on the
other rows of the batch although the matrix products here take many rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from manylora.kernels.packing import packed_in_turn
from manylora.kernels.plan import Plan
from manylora.kernels.reference_attention import paged_attention, write_kv
from manylora.kernels.reference_small import (
    gelu_mul,
    layer_norm,
    rms_norm,
    rotary_write_kv,
    silu_mul,
)
from manylora.kernels.reference_training import add_low_rank_, low_rank_backward_
from manylora.kernels.table import OFFSETS, EditTable, SliceGroup

__all__ = [
    "NAME",
    "add_low_rank_",
    "apply_edits_",
    "gelu_mul",
    "layer_norm",
    "low_rank_backward_",
    "pack_a",
    "pack_b",
    "pack_factors",
    "paged_attention",
    "rms_norm",
    "rotary_write_kv",
    "scale_inputs",
    "silu_mul",
    "write_kv",
]

NAME = "reference"


def pack_a(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A [r, in] as this backend wants it in the pool: flat, row-major, in `dtype`."""
    return a.to(dtype).flatten()


def pack_b(b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B [out, r] as this backend wants it in the pool: flat, row-major, in `dtype`."""
    return b.to(dtype).flatten()


def pack_factors(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, before: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Pairs of A and B, as `pack_a` and `pack_b` pack them, side by side in one buffer on the host.

    Args:
        before: so many elements, at least, are left at the buffer's start for the caller to write.

    Returns:
        The buffer, flat, of whole cache lines, and where each A and B begins in it, on one: int64
        [pairs, 2].
    """
    return packed_in_turn(factors, dtype, before, pack_a, pack_b)


def apply_edits_(
    y: torch.Tensor,
    x: torch.Tensor,
    group: SliceGroup,
    pool: torch.Tensor,
    table: EditTable,
    plan: Plan,
) -> None:
    """y[i] = out_scale * y[i] + scale * B (A x[i]) + bias, by row i's own adapter, in place.

    Rows without a slot, and slices that the row's adapter leaves alone, are not touched.

    Args:
        y: [rows, out], holds the base result; float32, float16 or bfloat16.
        x: [rows, in], same dtype.
        group: which columns of y belong to which module.
        pool: [elements], same dtype, the tensors of every resident adapter.
        table: where they lie.
        plan: the rows of every slot.
    """
    for rows, slot in _segments(plan):
        for module, start, size in zip(group.modules, group.starts, group.sizes, strict=True):
            edit = _Edit(pool, table, slot, module)
            if edit.leaves_output_alone:
                continue
            columns = slice(start, start + size)
            result = y[rows, columns].double()
            out_scale, bias = edit.vector("out_scale", size), edit.vector("bias", size)
            if out_scale is not None:
                result *= out_scale
            if edit.rank:
                result += edit.scale * edit.low_rank(x[rows].double(), size)
            if bias is not None:
                result += bias
            y[rows, columns] = result.to(y.dtype)


def scale_inputs(
    x: torch.Tensor, group: SliceGroup, pool: torch.Tensor, table: EditTable, plan: Plan
) -> torch.Tensor:
    """in_scale * x for the rows whose adapter has one for the group's module.

    Returns:
        x itself if there is no such row, otherwise a new tensor.

    Raises:
        ValueError: a group of several modules of which one has an in_scale: they share one x.
    """
    if not table.scales_inputs(group):
        return x
    if len(group.modules) > 1:
        raise ValueError(f"group: found in_scale among the modules {group.modules}; wanted one")
    scaled = x
    for rows, slot in _segments(plan):
        in_scale = _Edit(pool, table, slot, group.modules[0]).vector("in_scale", x.shape[1])
        if in_scale is not None:
            scaled = x.clone() if scaled is x else scaled
            scaled[rows] = (x[rows].double() * in_scale).to(x.dtype)
    return scaled


class _Edit:
    """One (slot, module) entry of the table, with its tensors."""

    def __init__(self, pool: torch.Tensor, table: EditTable, slot: int, module: int) -> None:
        self._pool = pool
        self._offsets = dict(zip(OFFSETS, table.offsets[slot, module].tolist(), strict=True))
        self.rank = int(table.rank[slot, module])
        self.scale = float(table.scale[slot, module])

    @property
    def leaves_output_alone(self) -> bool:
        return not self.rank and self._offsets["out_scale"] < 0 and self._offsets["bias"] < 0

    def vector(self, name: str, size: int) -> torch.Tensor | None:
        """A float32 vector that lies in the pool's bytes, as float64."""
        offset = self._offsets[name]
        if offset < 0:
            return None
        words = 4 * size // self._pool.element_size()
        return self._pool[offset : offset + words].view(torch.float32).double()

    def low_rank(self, x: torch.Tensor, out: int) -> torch.Tensor:
        """B (A x), float64 [rows, out]."""
        a = self._matrix("a", self.rank, x.shape[1])
        b = self._matrix("b", out, self.rank)
        return x @ a.T @ b.T

    def _matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        offset = self._offsets[name]
        return self._pool[offset : offset + rows * columns].view(rows, columns).double()


def _segments(plan: Plan) -> list[tuple[torch.Tensor, int]]:
    """(row indices, slot) of every segment."""
    starts = plan.seg_starts.tolist()
    order = plan.order.long()
    slots = plan.seg_slot.tolist()
    return [(order[starts[s] : starts[s + 1]], slots[s]) for s in range(plan.segments)]
