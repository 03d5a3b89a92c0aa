"""Paged attention and the KV write on the CPU: argument checks and the calls into C++.

A cache has the shape that the reference gives it, but how keys and values lie in a block is this
backend's business (attention_layout.h): only `write_kv` and `rotary_write_kv` write it.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.cpu import library

_DTYPES = library.DTYPES
_GROUP = 16  # kGroup in attention_layout.h
_MAX_HEAD_DIM = 1024  # kMaxHeadDim in attention.h

_attend = library.kernel("paged_attention", "8q")
_write = library.kernel("write_kv", "10q")


class Layer(ctypes.Structure):
    """`AttentionLayer` in attention.h."""

    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("slopes", c_void_p),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("dtype", c_int32),
    )
    address: int


@functools.lru_cache(maxsize=4096)
def layer(
    heads: int,
    head_dim: int,
    k_shape: torch.Size,
    v_shape: torch.Size,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
    slopes: int = 0,
    sinks: int = 0,
) -> Layer:
    """What stays the same over a layer's calls, checked once.

    Args:
        heads, head_dim: of q, or of k where it is written.
        k_shape, v_shape: of the caches.
        dtypes: of q and the two caches.
        slopes, sinks: addresses, or 0.
    """
    _, kv_heads, block_size, cache_dim = k_shape
    if heads % kv_heads or head_dim != cache_dim or v_shape != k_shape or len(set(dtypes)) != 1:
        raise ValueError(
            "attention: wanted heads a multiple of the caches' kv_heads, one head_dim, one dtype; "
            f"found {heads} heads of {head_dim}, caches {tuple(k_shape)} and {tuple(v_shape)}, "
            f"{dtypes}"
        )
    odd = head_dim % 2 and dtypes[0] == torch.bfloat16
    if block_size % _GROUP or head_dim > _MAX_HEAD_DIM or odd:
        raise ValueError(
            f"attention: wanted a block_size that is a multiple of {_GROUP}, a head_dim of at most "
            f"{_MAX_HEAD_DIM}, an even one in bfloat16; found {block_size}, {head_dim}, {dtypes[0]}"
        )
    sizes = (heads, kv_heads, head_dim, block_size, window)
    found = Layer(*sizes, slopes or None, sinks or None, scale, softcap, _DTYPES[dtypes[0]])
    found.address = ctypes.addressof(found)
    return found


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `manylora.kernels.reference_attention.paged_attention`.

    q may have any strides but the last, which is 1; the caches are contiguous.

    Raises:
        ValueError: tensors that do not fit each other or the batch.
    """
    rows, heads, head_dim = q.shape
    row_stride, head_stride, step = q.stride()
    if (
        (step != 1 and rows > 0)
        or rows != batch.rows
        or not k_cache.is_contiguous()
        or not v_cache.is_contiguous()
    ):
        raise _misfit(q, k_cache, v_cache, batch)
    fixed = layer(
        heads,
        head_dim,
        k_cache.shape,
        v_cache.shape,
        (q.dtype, k_cache.dtype, v_cache.dtype),
        scale,
        window,
        softcap,
        0 if slopes is None else _per_head("slopes", slopes, heads),
        0 if sinks is None else _per_head("sinks", sinks, heads),
    )
    out = q.new_empty(rows, heads, head_dim)
    _attend(
        out.data_ptr(),
        q.data_ptr(),
        row_stride,
        head_stride,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        batch.address,
        fixed.address,
    )
    return out


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
) -> None:
    """See `manylora.kernels.reference_attention.write_kv`; k and v as q in `paged_attention`.

    Raises:
        ValueError: tensors that do not fit each other or the batch.
    """
    shape, cache_shape, dtype = k.shape, k_cache.shape, k.dtype
    rows, kv_heads, head_dim = shape
    k_row, k_head, k_step = k.stride()
    v_row, v_head, v_step = v.stride()
    if (
        k_step != 1
        or v_step != 1
        or rows != batch.rows
        or kv_heads != cache_shape[1]
        or v.shape != shape
        or v.dtype != dtype
        or not k_cache.is_contiguous()
        or not v_cache.is_contiguous()
    ):
        raise _misfit(k, k_cache, v_cache, batch)
    dtypes = (dtype, k_cache.dtype, v_cache.dtype)
    _write(
        k.data_ptr(),
        k_row,
        k_head,
        v.data_ptr(),
        v_row,
        v_head,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        batch.address,
        layer(kv_heads, head_dim, cache_shape, v_cache.shape, dtypes).address,
    )


def _per_head(name: str, values: torch.Tensor, heads: int) -> int:
    """The address of float32 [heads]."""
    if values.dtype != torch.float32 or values.shape != (heads,) or not values.is_contiguous():
        raise ValueError(
            f"{name}: found {values.dtype} {tuple(values.shape)}; wanted float32 [{heads}]"
        )
    return values.data_ptr()


def _misfit(
    x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch
) -> ValueError:
    return ValueError(
        "attention: wanted q, k, v [rows, heads, head_dim] with contiguous last dimension, rows as "
        "in the batch, contiguous caches [blocks, kv_heads, block_size, head_dim]; "
        f"found {tuple(x.shape)} {x.stride()} {x.dtype}, batch of {batch.rows} rows, caches "
        f"{tuple(k_cache.shape)} {k_cache.stride()} and {tuple(v_cache.shape)} {v_cache.stride()}"
    )
