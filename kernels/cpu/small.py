"""The small operations between the matrix products on the CPU; see `kernels.reference_small`."""

from __future__ import annotations

import torch

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.cpu import library
from manylora.kernels.cpu.attention import layer

_DTYPES = library.DTYPES
ACTIVATIONS = {"silu": 0, "tanh": 1, "none": 2}
"""SiLU, and GELU's approximations; `Activation` in activation.cpp."""

_rms_norm = library.kernel("rms_norm", "7q2dq")
_layer_norm = library.kernel("layer_norm", "8qdq")
_act_mul = library.kernel("act_mul", "7q")
_rotary = library.kernel("rotary_write_kv", "9q")


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
    rows, size = x.shape
    stride, step = x.stride()
    dtype = x.dtype
    if step != 1 or weight.dtype != dtype or weight.numel() != size or not weight.is_contiguous():
        raise _misfit("rms_norm", x, weight)
    out = x.new_empty(rows, size)
    _rms_norm(
        out.data_ptr(),
        x.data_ptr(),
        stride,
        0 if residual is None else _residual(residual, x),
        weight.data_ptr(),
        rows,
        size,
        eps,
        offset,
        _DTYPES[dtype],
    )
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
    rows, size = x.shape
    stride, step = x.stride()
    dtype = x.dtype
    if step != 1 or weight.dtype != dtype or weight.numel() != size or not weight.is_contiguous():
        raise _misfit("layer_norm", x, weight)
    if bias is not None and (
        bias.dtype != dtype or bias.numel() != size or not bias.is_contiguous()
    ):
        raise _misfit("layer_norm", x, bias)
    out = x.new_empty(rows, size)
    _layer_norm(
        out.data_ptr(),
        x.data_ptr(),
        stride,
        0 if residual is None else _residual(residual, x),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        rows,
        size,
        eps,
        _DTYPES[dtype],
    )
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
    rows, size = qkv.shape
    stride, step = qkv.stride()
    _, kv_heads, _, head_dim = k_cache.shape
    heads = size // head_dim - 2 * kv_heads
    half = cos.shape[1]
    if (
        step != 1
        or rows != batch.rows
        or size % head_dim
        or heads < 1
        or 2 * half > head_dim
        or cos.shape != sin.shape
        or len(cos) != rows
        or cos.dtype != torch.float32
        or sin.dtype != torch.float32
        or not cos.is_contiguous()
        or not sin.is_contiguous()
        or not k_cache.is_contiguous()
        or not v_cache.is_contiguous()
    ):
        raise ValueError(
            "rotary_write_kv: wanted qkv [rows, (heads + 2 * kv_heads) * head_dim] with contiguous "
            "rows, as many as the batch's, cos and sin float32 [rows, half], contiguous caches; "
            f"found {tuple(qkv.shape)} {qkv.stride()}, batch of {batch.rows}, cos "
            f"{tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}, caches "
            f"{tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    dtypes = (qkv.dtype, k_cache.dtype, v_cache.dtype)
    _rotary(
        qkv.data_ptr(),
        stride,
        cos.data_ptr(),
        sin.data_ptr(),
        half,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        batch.address,
        layer(heads, head_dim, k_cache.shape, v_cache.shape, dtypes).address,
    )
    return qkv[:, : heads * head_dim].view(rows, heads, head_dim)


def _gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    rows, both = gate_up.shape
    stride, step = gate_up.stride()
    size = both // 2
    if step != 1 or both % 2:
        raise ValueError(
            "gate_up: wanted [rows, 2 * n] with contiguous rows; "
            f"found {tuple(gate_up.shape)} {gate_up.stride()}"
        )
    out = gate_up.new_empty(rows, size)
    _act_mul(
        out.data_ptr(),
        gate_up.data_ptr(),
        stride,
        rows,
        size,
        ACTIVATIONS[activation],
        _DTYPES[gate_up.dtype],
    )
    return out


def _residual(residual: torch.Tensor, x: torch.Tensor) -> int:
    """The address of a residual that fits x."""
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"residual: wanted contiguous {tuple(x.shape)} {x.dtype}; "
            f"found {tuple(residual.shape)} {residual.stride()} {residual.dtype}"
        )
    return residual.data_ptr()


def _misfit(name: str, x: torch.Tensor, vector: torch.Tensor) -> ValueError:
    return ValueError(
        f"{name}: wanted x [rows, n] with contiguous rows, weight and bias [n] of its dtype; "
        f"found {tuple(x.shape)} {x.stride()} {x.dtype}, {tuple(vector.shape)} {vector.dtype}"
    )
