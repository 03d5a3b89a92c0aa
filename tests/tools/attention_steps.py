"""Steps of paged attention with everything that a kernel must not touch poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from manylora.kernels import Backend
from manylora.kernels.attention import AttentionBatch, make_batch
from manylora.kernels.reference_attention import paged_attention, write_kv

NO_BLOCK = 2**30  # following it would leave any cache


@dataclass(slots=True)
class Step:
    """One step's tensors. Whatever no row may see is NaN, or in the table NO_BLOCK."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch: AttentionBatch
    table: np.ndarray
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]:
        return self.q, self.k_cache, self.v_cache, self.batch


def make_step(
    rows: Sequence[int],
    context: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    seed: int = 0,
) -> Step:
    """A step of sequences with random contents and shuffled blocks."""
    rng = np.random.default_rng(seed)
    counts, lengths = np.array(rows, np.int32), np.array(context, np.int32)
    max_blocks = -(-max(context) // block_size)
    blocks = len(rows) * max_blocks
    table = rng.permutation(blocks + 2)[:blocks].reshape(len(rows), max_blocks).astype(np.int32)
    k_cache = torch.full((blocks + 2, kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    keys, values = [], []
    for s, n in enumerate(context):
        k, v = (_normal(rng, (n, kv_heads, head_dim), dtype) for _ in range(2))
        whole = make_batch(lengths[s : s + 1], lengths[s : s + 1], table[s : s + 1], block_size)
        write_kv(k, v, k_cache, v_cache, whole)
        keys.append(k)
        values.append(v)
        table[s, -(-n // block_size) :] = NO_BLOCK
        first_seen = max(0, n - rows[s] - window + 1) if window and rows[s] else 0
        table[s, : first_seen // block_size] = NO_BLOCK
    q = _normal(rng, (int(counts.sum()), heads, head_dim), dtype)
    batch = make_batch(counts, lengths, table, block_size)
    return Step(q, k_cache, v_cache, batch, table, keys, values)


def kept(
    backend: Backend, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches as the backend keeps them: the CPU's kernels in attention_layout.h's order."""
    if backend.NAME != "cpu":
        return k_cache.clone(), v_cache.clone()
    depth = 2 if k_cache.dtype == torch.bfloat16 else 1
    k = k_cache.unflatten(2, (-1, 16)).unflatten(4, (-1, depth)).transpose(3, 4)
    v = v_cache.unflatten(2, (-1, 16 // depth, depth)).transpose(4, 5)
    return k.contiguous().view(k_cache.shape), v.contiguous().view(v_cache.shape)


def error_bound(step: Step, dtype: torch.dtype, **options: object) -> torch.Tensor:
    """How far from the float32 result a result in `dtype` may be: a rounding of every weight and
    one of the result; in float32 the error of the scores, too."""
    q, k_cache, v_cache, batch = step.tensors
    size = paged_attention(q.float(), k_cache.float(), v_cache.float().abs(), batch, **options)
    unit = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    return unit * size + 1e-6


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)
