"""Fused low-rank kernels and the few others a step needs: tensors in, tensors out, no server.

`select` gives the backend for a device: a module with `pack_factors`, `apply_edits_`,
`scale_inputs`, `write_kv` and `paged_attention`, which `manylora.kernels.reference` defines.
"""

from __future__ import annotations

from manylora.kernels.attention import AttentionBatch, make_batch
from manylora.kernels.backend import Backend, empty, select, side_by_side
from manylora.kernels.plan import Plan, PlanBuffer, make_plan
from manylora.kernels.stack import RankStack, make_stack, stack_factors
from manylora.kernels.table import EditTable, SliceGroup

__all__ = [
    "AttentionBatch",
    "Backend",
    "EditTable",
    "Plan",
    "PlanBuffer",
    "RankStack",
    "SliceGroup",
    "empty",
    "make_batch",
    "make_plan",
    "make_stack",
    "select",
    "side_by_side",
    "stack_factors",
]
