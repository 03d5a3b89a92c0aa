"""Paged attention and the KV write, in plain torch: the definition the kernels are held against."""

from __future__ import annotations

import torch

from manylora.kernels.attention import AttentionBatch


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
) -> None:
    """Copies the rows' keys and values into the cache, at ``batch.slot_mapping``.

    k, v: [rows, kv_heads, head_dim]. k_cache, v_cache: [blocks, kv_heads, block_size, head_dim].
    """
    block_size = k_cache.shape[2]
    block, offset = batch.slot_mapping // block_size, batch.slot_mapping % block_size
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


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
    """Causal attention of every row over its own sequence's cached keys, in float32.

    q: [rows, heads, head_dim]; query head h reads KV head ``h // (heads / kv_heads)``.
    k_cache, v_cache: [blocks, kv_heads, block_size, head_dim], this step's rows already written.
    window: if > 0, a row at position p sees keys p - window + 1 to p.
    softcap: if > 0, a scaled score s becomes ``softcap * tanh(s / softcap)``.
    slopes: float32 [heads]; slope * (key position - row position) is added to the score (ALiBi;
        Press et al. 2022).
    sinks: float32 [heads]; one more logit in the softmax's denominator, with no value.

    Returns [rows, heads, head_dim] in q's dtype.
    """
    rows, heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    starts = batch.seq_starts.tolist()
    for s, context in enumerate(batch.context.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        first = context - (end - begin)
        lo = max(0, first - window + 1) if window > 0 else 0
        positions = torch.arange(lo, context, device=q.device)
        block = batch.block_table[s].long()[positions // block_size]
        offset = positions % block_size
        keys = k_cache[block, :, offset].transpose(0, 1).float()  # [kv_heads, keys, head_dim]
        values = v_cache[block, :, offset].transpose(0, 1).float()
        queries = q[begin:end].float().reshape(end - begin, kv_heads, -1, head_dim)
        scores = torch.einsum("nkgd,ktd->kgnt", queries, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = positions - torch.arange(first, context, device=q.device)[:, None]
        if slopes is not None:
            scores += slopes.float().reshape(kv_heads, -1, 1, 1) * distance
        seen = distance <= 0
        if window > 0:
            seen &= distance > -window
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            sink = sinks.float().reshape(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : context - lo]
        mixed = torch.einsum("kgnt,ktd->nkgd", weights, values)
        out[begin:end] = mixed.reshape(end - begin, heads, head_dim).to(q.dtype)
    return out
