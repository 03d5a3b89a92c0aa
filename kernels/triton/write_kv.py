"""The KV write, by itself and with rotary embeddings.

write_kv: one program copies one row's keys and values. rotary_write_kv: one program has one row and
a few of its heads, be they of q, k or v: q is rotated where it lies, k on its way into the cache.

A row whose slot in the cache is negative is skipped: padding of a captured graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.triton import tiles
from manylora.kernels.triton.attention import check_fit

_HEADS = 8


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
) -> None:
    """See `manylora.kernels.reference_attention.write_kv`. k, v: any strides but the last, 1.

    Raises:
        ValueError: tensors that do not fit each other or the batch.
    """
    rows, kv_heads, head_dim = k.shape
    check_fit(k, k_cache, v_cache, batch)
    check_fit(v, k_cache, v_cache, batch)
    if k.shape != v.shape or kv_heads != k_cache.shape[1]:
        raise ValueError(
            f"attention: wanted k and v of {k_cache.shape[1]} heads; "
            f"found {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if rows == 0:
        return
    _write_kv[(rows, triton.cdiv(kv_heads, _HEADS))](
        k,
        v,
        k_cache,
        v_cache,
        batch.slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=k_cache.shape[2],
        HEADS=_HEADS,
        DIM=tiles.power_of_two(head_dim),
    )


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
) -> torch.Tensor:
    """See `manylora.kernels.reference_small.rotary_write_kv`. qkv, cos, sin: rows contiguous.

    Raises:
        ValueError: tensors that do not fit each other or the batch.
    """
    kv_heads, block_size, head_dim = k_cache.shape[1:]
    rows, half = cos.shape
    parts = qkv.view(qkv.shape[0], -1, head_dim)
    check_fit(parts[:, -kv_heads:], k_cache, v_cache, batch)
    angles_fit = cos.shape == sin.shape == (batch.rows, half) and 2 * half <= head_dim
    if not angles_fit or not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError(
            f"cos, sin: wanted contiguous [{batch.rows}, up to {head_dim // 2}]; "
            f"found {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    all_heads = parts.shape[1]
    q = parts[:, : all_heads - 2 * kv_heads]
    if rows == 0:
        return q
    _rotary_write_kv[(rows, triton.cdiv(all_heads, _HEADS))](
        qkv,
        cos,
        sin,
        k_cache,
        v_cache,
        batch.slot_mapping,
        qkv.stride(0),
        ALL_HEADS=all_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=block_size,
        HALF=half,
        HEADS=_HEADS,
        DIM=tiles.power_of_two(half),
        REST=tiles.power_of_two(max(1, head_dim - 2 * half)),
    )
    return q


@triton.jit
def _write_kv(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slot_mapping: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, DIM)[None, :]
    slot = tl.load(slot_mapping + row)
    ok = (head < KV_HEADS) & (d < HEAD_DIM) & (slot >= 0)
    place = ((slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK) * HEAD_DIM + d
    tl.store(k_cache + place, tl.load(k + row * k_stride + head * k_head_stride + d, mask=ok), ok)
    tl.store(v_cache + place, tl.load(v + row * v_stride + head * v_head_stride + d, mask=ok), ok)


@triton.jit
def _rotary_write_kv(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slot_mapping: tl.tensor,
    stride: tl.tensor,
    ALL_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    slot = tl.load(slot_mapping + row)
    is_q = head < ALL_HEADS - 2 * KV_HEADS
    is_v = head >= ALL_HEADS - KV_HEADS
    is_k = (head >= ALL_HEADS - 2 * KV_HEADS) & (head < ALL_HEADS - KV_HEADS)
    kept = (head < ALL_HEADS) & (slot >= 0)
    kv_head = (head - (ALL_HEADS - 2 * KV_HEADS)) % KV_HEADS
    place = ((slot // BLOCK * KV_HEADS + kv_head) * BLOCK + slot % BLOCK) * HEAD_DIM
    source = qkv + row * stride + head * HEAD_DIM

    d = tl.arange(0, DIM)[None, :]
    ok = (head < ALL_HEADS) & (d < HALF)
    turned = head < ALL_HEADS - KV_HEADS
    first = tl.load(source + d, mask=ok, other=0.0)
    second = tl.load(source + HALF + d, mask=ok, other=0.0)
    c = tl.load(cos + row * HALF + d, mask=d < HALF, other=0.0)
    s = tl.load(sin + row * HALF + d, mask=d < HALF, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    new_first = tl.where(turned, (a * c - b * s).to(first.dtype), first)
    new_second = tl.where(turned, (b * c + a * s).to(first.dtype), second)
    tl.store(source + d, new_first, mask=ok & is_q)
    tl.store(source + HALF + d, new_second, mask=ok & is_q)
    tl.store(k_cache + place + d, new_first, mask=ok & kept & is_k)
    tl.store(k_cache + place + HALF + d, new_second, mask=ok & kept & is_k)
    tl.store(v_cache + place + d, new_first, mask=ok & kept & is_v)
    tl.store(v_cache + place + HALF + d, new_second, mask=ok & kept & is_v)

    if HEAD_DIM > 2 * HALF:
        d = 2 * HALF + tl.arange(0, REST)[None, :]
        ok = kept & (d < HEAD_DIM)
        rest = tl.load(source + d, mask=ok, other=0.0)
        tl.store(k_cache + place + d, rest, mask=ok & is_k)
        tl.store(v_cache + place + d, rest, mask=ok & is_v)
