"""Paged attention and the KV write on the CPU: the calls into C++, which checks the tensors.

A cache has the shape that the reference gives it, but how keys and values lie in a block is this
backend's business (attention_layout.h): only `write_kv` and `rotary_write_kv` write it.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.cpu import library

_fill_layer = library.kernel("attention_layer", "7q2d")
_attend = library.kernel("paged_attention", "8q2d")
_write = library.kernel("write_kv", "5q")

_WANTED = (
    "attention: wanted q, k, v [rows, heads, head_dim] with contiguous heads, rows as in the "
    "batch, caches [blocks, kv_heads, block_size, head_dim], contiguous, all of one dtype; heads a "
    "multiple of kv_heads, a block_size that is a multiple of 16, a head_dim of at most 1024, in "
    "bfloat16 an even one; slopes and sinks float32 [heads]"
)


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
    kept: tuple[torch.Tensor | None, ...]  # slopes and sinks stay where they are


def layer(
    heads: int,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> Layer:
    """What stays the same over a layer's calls.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    made = Layer()
    made.address, made.kept = ctypes.addressof(made), (slopes, sinks)
    if not _fill_layer(
        made.address,
        heads,
        k_cache._cdata,
        v_cache._cdata,
        0 if slopes is None else slopes._cdata,
        0 if sinks is None else sinks._cdata,
        window,
        scale,
        softcap,
    ):
        found = library.describe(k_cache=k_cache, v_cache=v_cache, slopes=slopes, sinks=sinks)
        raise ValueError(f"{_WANTED}; found {heads} heads, {found}")
    return made


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
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not _attend(
        out._cdata,
        q._cdata,
        k_cache._cdata,
        v_cache._cdata,
        batch.address,
        0 if slopes is None else slopes._cdata,
        0 if sinks is None else sinks._cdata,
        window,
        scale,
        softcap,
    ):
        found = library.describe(q=q, k_cache=k_cache, v_cache=v_cache, slopes=slopes, sinks=sinks)
        raise ValueError(f"{_WANTED}; found {found}, batch of {batch.rows} rows")
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
    if not _write(k._cdata, v._cdata, k_cache._cdata, v_cache._cdata, batch.address):
        found = library.describe(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
        raise ValueError(f"{_WANTED}; found {found}, batch of {batch.rows} rows")
