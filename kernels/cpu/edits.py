"""The low-rank edits on the CPU: the calls into C++, which checks the tensors."""

from __future__ import annotations

import torch

from manylora.kernels.cpu import library
from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup

_apply = library.kernel("apply_edits", "8q")
_scale_rows = library.kernel("scale_rows", "7q")


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
    if plan.edited == 0:
        return
    if (
        plan.max_slot >= table.slots
        or group.max_module >= table.modules
        or not _apply(
            y._cdata,
            x._cdata,
            pool._cdata,
            plan.rows,
            group.end,
            group.address,
            table.address,
            plan.address,
        )
    ):
        raise _misfit(y, x, group, pool, table, plan)


def scale_inputs(
    x: torch.Tensor, group: SliceGroup, pool: torch.Tensor, table: EditTable, plan: Plan
) -> torch.Tensor:
    """See `manylora.kernels.reference.scale_inputs`.

    Raises:
        ValueError: a group of several modules of which one has an in_scale, or a misfit.
    """
    if plan.edited == 0 or not table.scales_inputs(group):
        return x
    if len(group.modules) > 1:
        raise ValueError(f"group: found in_scale among the modules {group.modules}; wanted one")
    module = group.modules[0]
    if plan.max_slot >= table.slots or x.shape[:1] != (plan.rows,):
        raise _misfit(x, x, group, pool, table, plan)
    if not table.in_scaled[plan.slots, module].any():
        return x
    scaled = x.clone(memory_format=torch.contiguous_format)
    if not _scale_rows(
        scaled._cdata,
        x._cdata,
        pool._cdata,
        plan.rows,
        module,
        table.address,
        plan.address,
    ):
        raise _misfit(x, x, group, pool, table, plan)
    return scaled


def _misfit(
    y: torch.Tensor,
    x: torch.Tensor,
    group: SliceGroup,
    pool: torch.Tensor,
    table: EditTable,
    plan: Plan,
) -> ValueError:
    return ValueError(
        "apply_edits_: wanted x [rows, in] and y [rows, out] with contiguous rows, one dtype with "
        "the pool, rows as in the plan, columns, modules and slots that exist; "
        f"found {library.describe(y=y, x=x, pool=pool)}, plan of {plan.rows} rows and slots to "
        f"{plan.max_slot}, table of {table.slots} slots and {table.modules} modules, {group}"
    )
