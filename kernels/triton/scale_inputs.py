"""scale_inputs: in_scale * x for the rows whose adapter has one, a copy of x for the others.

One program has one row and a tile of its columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup
from manylora.kernels.triton.edits import load_vector

_COLUMNS = 1024


def scale_inputs(
    x: torch.Tensor, group: SliceGroup, pool: torch.Tensor, table: EditTable, plan: Plan
) -> torch.Tensor:
    """See `manylora.kernels.reference.scale_inputs`.

    Raises:
        ValueError: a group of several modules of which one has an in_scale, or a misfit.
    """
    if plan.empty or not table.scales_inputs(group):
        return x
    if len(group.modules) > 1:
        raise ValueError(f"group: found in_scale among the modules {group.modules}; wanted one")
    rows, in_size = x.shape
    fits = rows == plan.rows and x.stride(1) == 1 and pool.dtype == x.dtype
    if not fits or plan.max_slot >= table.slots:
        raise ValueError(
            "scale_inputs: wanted x [rows, in] with contiguous rows, the pool's dtype, rows as in "
            f"the plan and slots that exist; found x {tuple(x.shape)} {x.stride()} {x.dtype}, "
            f"pool {pool.dtype}, plan of {plan.rows} rows and slots to {plan.max_slot}"
        )
    module = group.modules[0]
    if not table.in_scaled[plan.slots, module].any():
        return x
    out = torch.empty(rows, in_size, dtype=x.dtype, device=x.device)
    _scale_inputs[(rows, triton.cdiv(in_size, _COLUMNS))](
        out,
        x,
        pool,
        plan.row_slot,
        table.offsets,
        module,
        table.modules,
        x.stride(0),
        in_size,
        COLUMNS=_COLUMNS,
    )
    return out


@triton.jit(do_not_specialize=["module"])
def _scale_inputs(
    out: tl.tensor,
    x: tl.tensor,
    pool: tl.tensor,
    row_slot: tl.tensor,
    offsets: tl.tensor,
    module: tl.tensor,
    modules: tl.tensor,
    x_stride: tl.tensor,
    in_size: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = column < in_size
    slot = tl.load(row_slot + row)
    at = offsets + (slot.to(tl.int64) * modules + module) * 5 + 2
    in_scale = load_vector(pool, tl.load(at, mask=slot >= 0, other=-1), column, ok, 1.0)
    value = tl.load(x + row * x_stride + column, mask=ok, other=0.0)
    scaled = (value.to(tl.float32) * in_scale).to(x.dtype.element_ty)
    tl.store(out + row * in_size + column, scaled, mask=ok)
