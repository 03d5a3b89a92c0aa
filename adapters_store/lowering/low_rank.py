"""Low-rank pairs that were computed, not read: made ready for 16-bit storage."""

from __future__ import annotations

import torch

from manylora.adapters_store.edits import ModuleEdit


def balanced(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> ModuleEdit:
    """scale * b a, with a and b scaled to entries of at most 1 so that float16 holds products of
    small factors; float32. a: [rank, in], b: [out, rank]; rank 0 is no edit at all."""
    if a.shape[0] == 0:
        return ModuleEdit()
    size_a, size_b = (_largest(factor) for factor in (a, b))
    return ModuleEdit(a=(a / size_a).float(), b=(b / size_b).float(), scale=scale * size_a * size_b)


def difference(
    a: torch.Tensor, b: torch.Tensor, a0: torch.Tensor, b0: torch.Tensor, scale: float
) -> ModuleEdit:
    """scale * (b a - b0 a0), of twice the rank, in factors as small as the difference itself:
    storing the two large pairs would round away a small difference. float64 in.

    a, a0: [rank, in]; b, b0: [out, rank].
    """
    q_out, r_out = torch.linalg.qr(torch.cat([b, -b0], dim=1))
    q_in, r_in = torch.linalg.qr(torch.cat([a, a0]).T)
    left, sizes, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    root = sizes.sqrt()
    return balanced(root[:, None] * (right @ q_in.T), (q_out @ left) * root, scale)


def _largest(factor: torch.Tensor) -> float:
    return float(factor.abs().max()) or 1.0
