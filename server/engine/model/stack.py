"""All fused layers of a step in one call, where the CPU's kernels hold all their weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from manylora.kernels import cpu
from manylora.kernels.cpu import attention
from manylora.server.engine.model.product import PackedProduct
from manylora.server.engine.model.step import StepState

if TYPE_CHECKING:
    from manylora.server.engine.model.fuse import FusedLayer, HalfRotary


class DecoderStack:
    """Runs the layers' C++ twin. Each layer by itself remains for steps that it cannot run."""

    def __init__(
        self, layers: Sequence[FusedLayer], rotary: HalfRotary, activation: str, step: StepState
    ) -> None:
        self.layers = layers
        self.modules = _modules(layers)
        self.rotary = rotary
        self.activation = activation
        self.step = step
        self.active = False
        self._cache: Tensor | None = None
        self._built: cpu.DecoderLayers | None = None

    def begin(self) -> bool:
        """Whether this step can be run whole: no row's adapter replaces the parameters of a module
        in the layers or scales its input."""
        step = self.step
        replaced = not self.modules.isdisjoint(step.overridden)
        self.active = not replaced and (step.plan.empty or not self._scaled())
        return self.active

    def _scaled(self) -> bool:
        scaled = self.step.table.in_scaled[self.step.plan.slots].any(axis=0)
        return not self.modules.isdisjoint(np.flatnonzero(scaled).tolist())

    def run_(self, x: Tensor) -> None:
        """x: [rows, hidden], in place. The model has called its rotary embedding before."""
        step, cache = self.step, self.layers[0].attention.k_cache
        if self._built is None or self._cache is not cache:
            self._built, self._cache = self._build(), cache
        cos, sin = (torch.stack(tables) for tables in zip(*self.rotary.step.values(), strict=True))
        self._built.run_(x, cos, sin, step.pool, step.table, step.plan, step.attention)

    def _build(self) -> cpu.DecoderLayers:
        first = self.layers[0].before_attention
        kinds = list(self.rotary.step)
        layers = [_layer(layer, kinds) for layer in self.layers]
        return cpu.DecoderLayers(layers, self.activation, first.eps, first.offset)


def make_stack(
    layers: Sequence[FusedLayer], rotary: HalfRotary, step: StepState
) -> DecoderStack | None:
    """None where a layer's weights are not packed, or other kernels are wanted."""
    packed = all(
        isinstance(p.product, PackedProduct) for layer in layers for p in layer.projections
    )
    norms = [norm for layer in layers for norm in layer.norms if norm is not None]
    plain = all(norm.weight.dtype == torch.bfloat16 for norm in norms)
    if step.kernels.NAME != cpu.NAME or not packed or not plain:
        return None
    gated = layers[0].gated
    activation = gated.keywords["approximate"] if isinstance(gated, partial) else "silu"
    return DecoderStack(layers, rotary, activation, step)


def _modules(layers: Sequence[FusedLayer]) -> frozenset[int]:
    """The ids of what an adapter may change in the layers."""
    norms = [norm.module for layer in layers for norm in layer.norms if norm is not None]
    groups = [projection.group.modules for layer in layers for projection in layer.projections]
    return frozenset([*norms, *(module for group in groups for module in group)])


def _layer(layer: FusedLayer, rotary_kinds: Sequence[str | None]) -> cpu.DecoderLayer:
    call, k_cache, v_cache = layer.attention.call, layer.attention.k_cache, layer.attention.v_cache
    projections = []
    for projection in layer.projections:
        product = projection.product
        assert isinstance(product, PackedProduct)
        projections.append(cpu.DecoderProjection(product.packed, product.bias, projection.group))
    return cpu.DecoderLayer(
        projections,
        [None if norm is None else norm.weight for norm in layer.norms],
        k_cache,
        v_cache,
        attention.layer(
            layer.o.product.in_size // call.head_dim,
            k_cache,
            v_cache,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            slopes=call.slopes,
            sinks=call.sinks,
        ),
        rotary_kinds.index(layer.rotary_kind) if len(rotary_kinds) > 1 else 0,
    )
