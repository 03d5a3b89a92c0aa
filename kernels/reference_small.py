"""The small operations between the matrix products, in plain torch: the kernels' definition.

All compute in float32 and round to the tensors' dtype once, where Hugging Face's modules may round
intermediate results too. The residual sum is rounded before it is normalised, as it is there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.reference_attention import write_kv


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``h / sqrt(mean(h²) + eps) * (offset + weight)`` and h, where h = residual + x.

    x: [rows, n]. weight: [n]. residual: [rows, n], updated in place to h and returned; without
    one, h is x. offset: 1 for models (Gemma) that keep weight - 1.
    """
    h = x if residual is None else residual.add_(x)
    wide = h.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (offset + weight.float())).to(x.dtype), h


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(h - mean) / sqrt(var + eps) * weight + bias`` and h, where h = residual + x.

    x: [rows, n]. weight, bias: [n]. residual: as in rms_norm.
    """
    h = x if residual is None else residual.add_(x)
    wide_bias = None if bias is None else bias.float()
    normed = F.layer_norm(h.float(), (h.shape[-1],), weight.float(), wide_bias, eps)
    return normed.to(x.dtype), h


def rotary_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
) -> torch.Tensor:
    """Rotates q in place, writes rotated k and v into the cache, and returns q as a view of qkv.

    qkv: [rows, (heads + 2 * kv_heads) * head_dim], heads of q, then k, then v; k and v are left as
    they are. cos, sin: float32 [rows, half]; the first 2 * half dimensions of a head are rotated,
    dimension i with i + half (Su et al., RoFormer, in the layout of GPT-NeoX and Llama).
    k_cache, v_cache: [blocks, kv_heads, block_size, head_dim]. Returns [rows, heads, head_dim].
    """
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    parts = qkv.view(qkv.shape[0], -1, head_dim)
    heads = parts.shape[1] - 2 * kv_heads
    q, k, v = parts[:, :heads], parts[:, heads:-kv_heads], parts[:, -kv_heads:]
    q.copy_(_rotate(q, cos, sin))
    write_kv(_rotate(k, cos, sin), v, k_cache, v_cache, batch)
    return q


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    wide = x.float()
    first, second = wide[..., :half], wide[..., half : 2 * half]
    rotated = (first * cos - second * sin, second * cos + first * sin, wide[..., 2 * half :])
    return torch.cat(rotated, dim=-1).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of [rows, 2 * n], gate in the first half: [rows, n]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_mul(gate_up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``gelu(gate) * up`` of [rows, 2 * n], gate in the first half: [rows, n].

    approximate: "none" (erf) or "tanh", as in torch.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate=approximate) * up).to(gate_up.dtype)
