"""The low-rank edits on the CPU: argument checks and the call into C++."""

from __future__ import annotations

import torch

from manylora.kernels.cpu import library
from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup

_DTYPES = library.DTYPES

_apply = library.kernel("apply_edits", "10q")
_scale_rows = library.kernel("scale_rows", "9q")


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
    rows, in_size = x.shape
    y_rows, out_size = y.shape
    x_stride, x_step = x.stride()
    y_stride, y_step = y.stride()
    dtype = x.dtype
    if (
        rows != plan.rows
        or y_rows != rows
        or out_size < group.end
        or x_step != 1
        or y_step != 1
        or y.dtype != dtype
        or pool.dtype != dtype
        or plan.max_slot >= table.slots
        or group.max_module >= table.modules
    ):
        raise _misfit(y, x, group, pool, table, plan)
    _apply(
        y.data_ptr(),
        y_stride,
        x.data_ptr(),
        x_stride,
        in_size,
        _DTYPES[dtype],
        pool.data_ptr(),
        group.address,
        table.address,
        plan.address,
    )


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
    rows, in_size = x.shape
    fits = rows == plan.rows and x.stride(1) == 1 and pool.dtype == x.dtype
    if not fits or plan.max_slot >= table.slots:
        raise _misfit(x, x, group, pool, table, plan)
    module = group.modules[0]
    if not table.in_scaled[plan.slots, module].any():
        return x
    scaled = x.clone(memory_format=torch.contiguous_format)
    _scale_rows(
        scaled.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        in_size,
        _DTYPES[x.dtype],
        pool.data_ptr(),
        module,
        table.address,
        plan.address,
    )
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
        f"found y {tuple(y.shape)} {y.stride()} {y.dtype}, x {tuple(x.shape)} {x.stride()} "
        f"{x.dtype}, pool {pool.dtype}, plan of {plan.rows} rows and slots to {plan.max_slot}, "
        f"table of {table.slots} slots and {table.modules} modules, {group}"
    )
