"""DoRA: the adapted weight's rows keep their directions and get magnitudes of their own.

peft (`tuners/lora/dora.py`): with Δ = scale · B A and m = magnitude / ‖W + Δ‖ row by row,
y = m ∘ (W x + Δ x) + b, so the base's bias is left alone. Liu et al. 2024 (arXiv:2402.09353).
"""

from __future__ import annotations

import torch

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.place import Place
from manylora.errors import FailedPrecondition


def rescaled(edit: ModuleEdit, place: Place, magnitude: torch.Tensor) -> ModuleEdit:
    """The low-rank edit with DoRA's magnitude [out], float64.

    Raises FailedPrecondition without the base's weight, or where a row of W + Δ is zero.
    """
    assert edit.a is not None
    assert edit.b is not None
    a, b = edit.a.double(), edit.b.double()
    norms = [
        torch.linalg.vector_norm(weight + edit.scale * (b[rows] @ a), dim=1)
        for rows, weight in place.row_blocks()
    ]
    out_scale = magnitude / torch.cat(norms)
    if not out_scale.isfinite().all():
        raise FailedPrecondition(
            "DoRA divides by the norm of a row of zeros",
            field=f"{WEIGHTS_FILE}: {place.name}",
        )
    result = balanced(a, out_scale[:, None] * b, edit.scale)
    result.out_scale = out_scale.float()
    bias = place.bias()
    if bias is not None:
        result.bias = ((1 - result.out_scale.double()) * bias).float()
    return result
