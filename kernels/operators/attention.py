"""Operators of paged attention and of the write into its cache. They have no gradient."""

from __future__ import annotations

import torch

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.operators.plan import backend_of


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
    backend: str = "",
) -> torch.Tensor:
    """See `manylora.kernels.reference_attention.paged_attention`."""
    how = (scale, window, softcap, slopes, sinks, batch.decodes, batch.chunks, backend)
    result: torch.Tensor = _paged_attention(q, k_cache, v_cache, *_tensors(batch), *how)
    return result


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    backend: str = "",
) -> None:
    """See `manylora.kernels.reference_attention.write_kv`."""
    _write_kv(k, v, k_cache, v_cache, *_tensors(batch), backend)


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    backend: str = "",
) -> torch.Tensor:
    """See `manylora.kernels.reference_small.rotary_write_kv`."""
    _rotary_write_kv(qkv, cos, sin, k_cache, v_cache, *_tensors(batch), backend)
    _, kv_heads, _, head_dim = k_cache.shape
    return qkv.view(qkv.shape[0], -1, head_dim)[:, : -2 * kv_heads]


def _tensors(batch: AttentionBatch) -> tuple[torch.Tensor, ...]:
    return batch.seq_starts, batch.context, batch.block_table, batch.slot_mapping


@torch.library.custom_op("manylora::paged_attention", mutates_args=())
def _paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_starts: torch.Tensor,
    context: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    decodes: int | None,
    chunks: int | None,
    backend: str,
) -> torch.Tensor:
    batch = AttentionBatch(seq_starts, context, block_table, slot_mapping, decodes, chunks)
    found = backend_of(backend, q).paged_attention(
        q,
        k_cache,
        v_cache,
        batch,
        scale=scale,
        window=window,
        softcap=softcap,
        slopes=slopes,
        sinks=sinks,
    )
    return found.contiguous()


@_paged_attention.register_fake
def _(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("manylora::write_kv", mutates_args=("k_cache", "v_cache"))
def _write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_starts: torch.Tensor,
    context: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    backend: str,
) -> None:
    batch = AttentionBatch(seq_starts, context, block_table, slot_mapping)
    backend_of(backend, k).write_kv(k, v, k_cache, v_cache, batch)


@torch.library.custom_op("manylora::rotary_write_kv", mutates_args=("qkv", "k_cache", "v_cache"))
def _rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_starts: torch.Tensor,
    context: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    backend: str,
) -> None:
    batch = AttentionBatch(seq_starts, context, block_table, slot_mapping)
    backend_of(backend, qkv).rotary_write_kv(qkv, cos, sin, k_cache, v_cache, batch)


@_write_kv.register_fake
@_rotary_write_kv.register_fake
def _(*_: object) -> None:
    pass
