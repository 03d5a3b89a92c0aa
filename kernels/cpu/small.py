"""The small operations between the matrix products on the CPU; see `kernels.reference_small`."""

from __future__ import annotations

import torch

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.cpu import library

ACTIVATIONS = {"silu": 0, "tanh": 1, "none": 2}
"""SiLU, and GELU's approximations; `Activation` in activation.cpp."""

_rms_norm = library.kernel("rms_norm", "4q2d")
_layer_norm = library.kernel("layer_norm", "5qd")
_act_mul = library.kernel("act_mul", "3q")
_rotary = library.kernel("rotary_write_kv", "6q")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `manylora.kernels.reference_small.rms_norm`.

    x may have a row stride.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    added = 0 if residual is None else residual._cdata
    if not _rms_norm(out._cdata, x._cdata, added, weight._cdata, eps, offset):
        raise _misfit("rms_norm", x, residual, weight)
    return out, x if residual is None else residual


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `manylora.kernels.reference_small.layer_norm`; x may have a row stride.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    added = 0 if residual is None else residual._cdata
    shift = 0 if bias is None else bias._cdata
    if not _layer_norm(out._cdata, x._cdata, added, weight._cdata, shift, eps):
        raise _misfit("layer_norm", x, residual, weight, bias)
    return out, x if residual is None else residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `manylora.kernels.reference_small.silu_mul`; gate_up may have a row stride."""
    return _gate(gate_up, "silu")


def gelu_mul(gate_up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """See `manylora.kernels.reference_small.gelu_mul`; gate_up may have a row stride."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: found {approximate!r}; wanted 'none' or 'tanh'")
    return _gate(gate_up, approximate)


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
) -> torch.Tensor:
    """See `manylora.kernels.reference_small.rotary_write_kv`; qkv may have a row stride.

    Raises:
        ValueError: tensors that do not fit each other or the batch.
    """
    if not _rotary(
        qkv._cdata, cos._cdata, sin._cdata, k_cache._cdata, v_cache._cdata, batch.address
    ):
        raise ValueError(
            "rotary_write_kv: wanted qkv [rows, (heads + 2 * kv_heads) * head_dim] with contiguous "
            "rows, as many as the batch's, cos and sin float32 [rows, half], contiguous caches of "
            "qkv's dtype; found "
            + library.describe(qkv=qkv, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache)
            + f", batch of {batch.rows} rows"
        )
    rows, size = qkv.shape
    _, kv_heads, _, head_dim = k_cache.shape
    queries = size - 2 * kv_heads * head_dim
    return qkv[:, :queries].view(rows, queries // head_dim, head_dim)


def _gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    rows, both = gate_up.shape
    out = gate_up.new_empty(rows, both // 2)
    if not _act_mul(out._cdata, gate_up._cdata, ACTIVATIONS[activation]):
        raise ValueError(
            "gate_up: wanted [rows, 2 * n] with contiguous rows, float32, float16 or bfloat16; "
            f"found {library.describe(gate_up=gate_up)}"
        )
    return out


def _misfit(
    name: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> ValueError:
    return ValueError(
        f"{name}: wanted x [rows, n] with contiguous rows, float32, float16 or bfloat16, a "
        "residual of its shape, weight and bias [n], contiguous and of its dtype; found "
        + library.describe(x=x, residual=residual, weight=weight, bias=bias)
    )
