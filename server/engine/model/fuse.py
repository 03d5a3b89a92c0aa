"""Pass 3, fuse: decoder layers of the Llama family as a dozen kernel calls each.

A layer whose class is in `FUSABLE` is: norm, packed qkv product, rotary and KV write, paged
attention, o product, residual and norm, packed gate_up product, gated activation, down product,
residual (with Gemma's two more norms where the class has them). Hugging Face's tree around the
layers stays: embedding, final norm, head, and whatever the model does to its logits. Models with
any other layer keep the unfused path, which is also what this one is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from manylora.kernels import SliceGroup, cpu
from manylora.server.engine.model.adapt import AdaptedHead, AdaptedLinear, AdaptedNorm
from manylora.server.engine.model.attach import LayerAttention
from manylora.server.engine.model.stack import DecoderStack, make_stack
from manylora.server.engine.model.step import StepState

FUSABLE = {
    LlamaDecoderLayer,
    MistralDecoderLayer,
    Qwen2DecoderLayer,
    Phi3DecoderLayer,
    GemmaDecoderLayer,
    Gemma2DecoderLayer,
}
"""By exact class: a subclass may compute something else."""

GEMMA = {GemmaDecoderLayer, Gemma2DecoderLayer}
"""Their norms multiply by 1 + weight."""


Gated = Callable[[Tensor], Tensor]
"""[rows, 2 * n], gate first → [rows, n]."""


def fuse(
    model: PreTrainedModel, layers: Sequence[LayerAttention], step: StepState
) -> Mapping[str, PackedRows]:
    """Replaces the decoder's layers by fused ones, if all of them can be.

    Returns:
        Where the replaced modules' weights are now, by the module's name in the tree; empty if
        the model stays as it was.
    """
    decoder = model.base_model
    found: nn.ModuleList | None = getattr(decoder, "layers", None)
    if found is None or any(type(layer) not in FUSABLE for layer in found):
        return {}
    gated = _gated_activation(found[0].mlp, step)
    if gated is None:
        return {}
    names = {module: name for name, module in model.named_modules()}
    packed: dict[str, PackedRows] = {}
    arena = cpu.HugeArena()
    eps = float(model.config.get_text_config(decoder=True).rms_norm_eps)
    for i, attention in enumerate(layers):
        base = found[i]
        layer = FusedLayer(base, attention, gated, eps, step, arena)
        found[i] = layer
        attention.call = replace(attention.call, module=layer)
        for group, projection in zip(_groups(base), layer.projections, strict=True):
            packed |= {names[m]: rows for m, rows in zip(group, projection.rows(), strict=True)}
    fused: list[FusedLayer] = list(found)  # type: ignore[arg-type]
    stack = make_stack(fused, step)
    for layer in fused:
        layer.stack = stack
    decoder.rotary_emb = HalfRotary(decoder.rotary_emb)
    for name, module in list(model.named_modules()):
        if type(module) is AdaptedHead:
            model.set_submodule(name, FusedHead(module, arena))
    return packed


@dataclass(slots=True, frozen=True)
class PackedRows:
    """One module's weight and bias within a packed product."""

    projection: Projection
    start: int
    size: int

    def weight(self) -> Tensor:
        """[out, in], a copy or a view."""
        return self.projection.product.weight(self.start, self.size)

    def bias(self) -> Tensor | None:
        """[out], a view; None if the module has none."""
        bias = self.projection.product.bias
        return None if bias is None else bias.detach().narrow(0, self.start, self.size)


class Projection:
    """One product for modules that read the same x, then every row's own edits.

    [rows, in] → [rows, sum of the modules' outs]. Copies the modules' weights.
    """

    def __init__(
        self, modules: Sequence[AdaptedLinear], step: StepState, arena: cpu.HugeArena
    ) -> None:
        sizes = [module.weight.shape[0] for module in modules]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        ids = [module.group.modules[0] for module in modules]
        self.group = SliceGroup(tuple(ids), tuple(starts), tuple(sizes))
        self.step = step
        biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
        weights: list[Tensor] = [module.weight for module in modules]
        bias = torch.cat(biases) if biases else None
        self.product = PackedProduct(torch.cat(weights), bias, arena)

    def rows(self) -> list[PackedRows]:
        """Each module's part, in the order given."""
        group = self.group
        return [PackedRows(self, *at) for at in zip(group.starts, group.sizes, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        step = self.step
        if step.plan.empty:
            return self.product(x)
        y = self._scaled(x) if step.table.scales_inputs(self.group) else self.product(x)
        if step.overridden:
            self._override_(y, x)
        step.kernels.apply_edits_(y, x, self.group, step.pool, step.table, step.plan)
        return y

    def _override_(self, y: Tensor, x: Tensor) -> None:
        """The adapters' own products in the place of the base's."""
        group = self.group
        for module, start, size in zip(group.modules, group.starts, group.sizes, strict=True):
            part = y[:, start : start + size]
            for where, own in self.step.overridden.get(module, ()):
                part[where] = own.multiply(part[where], x[where])

    def _scaled(self, x: Tensor) -> Tensor:
        """The product where modules of the group may scale their inputs, each in its own way."""
        step, group = self.step, self.group
        parts = []
        for module, start, size in zip(group.modules, group.starts, group.sizes, strict=True):
            single = SliceGroup.single(module, size)
            scaled = step.kernels.scale_inputs(x, single, step.pool, step.table, step.plan)
            parts.append(self.product(scaled)[:, start : start + size])
        return torch.cat(parts, dim=1)


class PackedProduct:
    """x [rows, in] → x W^T + b, by our own kernel where it can pack the weight [out, in], else
    torch's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, arena: cpu.HugeArena) -> None:
        self.bias = bias
        self.in_size = weight.shape[1]
        self.packed = cpu.PackedWeight(weight, arena) if cpu.packs(weight) else None
        self._plain = None if self.packed else weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        if self._plain is None:
            assert self.packed is not None
            return cpu.linear(x, self.packed, self.bias)
        return F.linear(x, self._plain, self.bias)

    def weight(self, start: int, size: int) -> Tensor:
        """Rows of the weight: [size, in], a copy or a view."""
        if self._plain is None:
            assert self.packed is not None
            return self.packed.unpack(start, size)
        return self._plain.narrow(0, start, size)


class FusedHead(AdaptedHead):
    """The head with a packed weight."""

    def __init__(self, head: AdaptedHead, arena: cpu.HugeArena) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = head.weight, head.bias
        self.group, self.step = head.group, head.step
        self._product = PackedProduct(head.weight, head.bias, arena)

    def product(self, x: Tensor) -> Tensor:
        return torch.unflatten(self._product(x.flatten(0, -2)), 0, x.shape[:-1])


class HalfRotary(nn.Module):
    """The model's rotary embedding in float32, without the half that repeats the other."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin: float32 [rows, half]."""
        like = torch.empty(0, dtype=torch.float32, device=x.device)
        cos, sin = self.rotary(like, position_ids)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


@dataclass(slots=True, frozen=True, eq=False)
class FusedNorm:
    """One of a layer's norms; the tree keeps the norm itself.

    weight: [n]. module: its id, -1 if it cannot be adapted. offset: see `rms_norm`.
    """

    weight: Tensor
    module: int
    eps: float
    offset: float
    step: StepState

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `rms_norm`, but each row by its adapter's own weight if it has one."""
        step = self.step
        normed, h = step.kernels.rms_norm(x, self.weight, self.eps, residual, offset=self.offset)
        if step.overridden:
            for where, own in step.overridden.get(self.module, ()):
                if own.weight is not None:
                    rms_norm = step.kernels.rms_norm
                    normed[where] = rms_norm(h[where], own.weight, self.eps, offset=self.offset)[0]
        return normed, h


class FusedLayer(nn.Module):
    """One decoder layer over a flat batch."""

    def __init__(
        self,
        base: Any,
        attention: LayerAttention,
        gated: Gated,
        eps: float,
        step: StepState,
        arena: cpu.HugeArena,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.step = step
        self.gated = gated
        self.projections = tuple(Projection(group, step, arena) for group in _groups(base))
        self.qkv, self.o, self.gate_up, self.down = self.projections
        offset = 1.0 if type(base) in GEMMA else 0.0
        norms: dict[str, FusedNorm] = {}
        for name, norm in base.named_children():
            if name.endswith("layernorm"):
                self.add_module(name, norm)
                module = norm.module_id if isinstance(norm, AdaptedNorm) else -1
                norms[name] = FusedNorm(norm.weight, module, eps, offset, step)
        self.before_attention = norms["input_layernorm"]
        self.after_attention: FusedNorm | None = None
        self.before_mlp = norms["post_attention_layernorm"]
        self.after_mlp: FusedNorm | None = None
        if "pre_feedforward_layernorm" in norms:
            self.after_attention = norms["post_attention_layernorm"]
            self.before_mlp = norms["pre_feedforward_layernorm"]
            self.after_mlp = norms["post_feedforward_layernorm"]
        self.norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        self.stack: DecoderStack | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: object,
    ) -> Tensor:
        """hidden_states: [1, rows, hidden], updated in place and returned."""
        x = hidden_states[0]
        if (stack := self.stack) is not None:
            if self is stack.layers[0] and stack.begin():
                stack.run_(x, position_embeddings)
            if stack.active:
                return hidden_states
        normed = self.before_attention(x)[0]
        y = self.o(self._attend(self.qkv(normed), position_embeddings))
        if self.after_attention is not None:
            y = self.after_attention(y)[0]
        normed, x = self.before_mlp(y, x)
        y = self.down(self.gated(self.gate_up(normed)))
        if self.after_mlp is not None:
            y = self.after_mlp(y)[0]
        x += y
        return hidden_states

    def _attend(self, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        layer, step = self.attention, self.step
        call, kernels = layer.call, step.kernels
        cos, sin = rotary
        q = kernels.rotary_write_kv(qkv, cos, sin, layer.k_cache, layer.v_cache, step.attention)
        mixed = kernels.paged_attention(
            q,
            layer.k_cache,
            layer.v_cache,
            step.attention,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            slopes=call.slopes,
            sinks=call.sinks,
        )
        return mixed.flatten(1)


def _gated_activation(mlp: Any, step: StepState) -> Gated | None:
    """The kernel that computes the MLP's activation, found by what it computes."""
    kernels = step.kernels
    activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    x = torch.linspace(-4, 4, 33, device=step.pool.device)[None]
    known: list[Gated] = [
        kernels.silu_mul,
        partial(kernels.gelu_mul, approximate="none"),
        partial(kernels.gelu_mul, approximate="tanh"),
    ]
    wanted = activation(x)
    for gated in known:
        if torch.allclose(gated(torch.cat([x, torch.ones_like(x)], dim=1)), wanted, atol=1e-6):
            return gated
    return None


def _groups(base: Any) -> tuple[list[AdaptedLinear], ...]:
    """The layer's projections, those that read the same input together: qkv, o, gate_up, down."""
    attention, mlp = base.self_attn, base.mlp
    if hasattr(attention, "qkv_proj"):
        qkv, gate_up = [attention.qkv_proj], [mlp.gate_up_proj]
    else:
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up = [mlp.gate_proj, mlp.up_proj]
    return qkv, [attention.o_proj], gate_up, [mlp.down_proj]
