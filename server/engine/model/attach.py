"""Pass 2, attach: every attention layer reads and writes our paged KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from manylora.server.engine.model.record import AttentionCall, check_keywords
from manylora.server.engine.model.step import StepState

ATTENTION = "manylora_paged"
"""Our name in transformers' registry of attention functions. No mask function has this name, so
models build no mask: causality and windows are the kernel's."""

ATTRIBUTE = "manylora_layer"
"""Attribute of an attention module that holds its `LayerAttention`."""


@dataclass(slots=True, eq=False)
class LayerAttention:
    """One attention layer: how it attends, its cache, and the current step.

    k_cache, v_cache: [blocks, kv_heads, block_size, head_dim].
    """

    call: AttentionCall
    step: StepState
    k_cache: Tensor
    v_cache: Tensor


def attach(calls: Iterable[AttentionCall], step: StepState) -> list[LayerAttention]:
    """Gives each attention module of the probe what our attention function reads from it."""
    none = torch.empty(0)
    layers = [LayerAttention(call, step, none, none) for call in calls]
    for layer in layers:
        setattr(layer.call.module, ATTRIBUTE, layer)
    return layers


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    **keywords: object,
) -> tuple[Tensor, None]:
    """Keeps this step's keys and values, then attends over the cache.

    What the model passes beyond the tensors was recorded at load (`probe`), the same each step;
    a keyword that was not seen then raises FailedPrecondition.

    Args:
        query: [1, heads, rows, head_dim]; key, value: [1, kv_heads, rows, head_dim].

    Returns:
        [1, rows, heads, head_dim], and no attention weights.
    """
    check_keywords(module, keywords)
    layer: LayerAttention = getattr(module, ATTRIBUTE)
    call, step = layer.call, layer.step
    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    step.kernels.write_kv(k, v, layer.k_cache, layer.v_cache, step.attention)
    out = step.kernels.paged_attention(
        query[0].transpose(0, 1),
        layer.k_cache,
        layer.v_cache,
        step.attention,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        slopes=call.slopes,
        sinks=call.sinks,
    )
    return out[None], None


AttentionInterface.register(ATTENTION, paged_attention)
