"""Pass 3, fuse: decoder layers of the Llama family as a dozen kernel calls each.

A layer whose class is in `FUSABLE` is: norm, packed qkv product, rotary and KV write, paged
attention, o product, residual and norm, packed gate_up product, gated activation, down product,
residual (with Gemma's two more norms, and norms of the heads of q and k, where the class has them).
Hugging Face's tree around the layers stays: embedding, final norm, head, and whatever the model
does to its logits. Models with any other layer keep the unfused path, which is also what this one
is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from manylora.server.engine.model.adapt import AdaptedHead, AdaptedLinear, AdaptedNorm
from manylora.server.engine.model.attach import LayerAttention
from manylora.server.engine.model.product import MakeProduct
from manylora.server.engine.model.projection import FusedHead, PackedRows, Projection
from manylora.server.engine.model.stack import DecoderStack, make_stack
from manylora.server.engine.model.step import StepState

FUSABLE = {
    LlamaDecoderLayer,
    MistralDecoderLayer,
    Qwen2DecoderLayer,
    Qwen3DecoderLayer,
    Phi3DecoderLayer,
    GemmaDecoderLayer,
    Gemma2DecoderLayer,
    Gemma3DecoderLayer,
}
"""By exact class: a subclass may compute something else."""

GEMMA = {GemmaDecoderLayer, Gemma2DecoderLayer, Gemma3DecoderLayer}
"""Their norms multiply by 1 + weight."""


Gated = Callable[[Tensor], Tensor]
"""[rows, 2 * n], gate first → [rows, n]."""


def fuse(
    model: PreTrainedModel,
    layers: Sequence[LayerAttention],
    step: StepState,
    make: MakeProduct,
    *,
    tied: bool,
) -> Mapping[str, PackedRows]:
    """Replaces the decoder's layers by fused ones, if all of them can be.

    make: what multiplies with their weights and the head's. tied: whether the head's weight is the
    input embedding's own.

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
    eps = float(model.config.get_text_config(decoder=True).rms_norm_eps)
    for i, attention in enumerate(layers):
        base = found[i]
        layer = FusedLayer(base, attention, gated, eps, step, make)
        found[i] = layer
        attention.call = replace(attention.call, module=layer)
        for group, projection in zip(_groups(base), layer.projections, strict=True):
            packed |= {names[m]: rows for m, rows in zip(group, projection.rows(), strict=True)}
    fused: list[FusedLayer] = list(found)  # type: ignore[arg-type]
    decoder.rotary_emb = rotary = HalfRotary(decoder.rotary_emb)
    stack = make_stack(fused, rotary, step)
    for layer in fused:
        layer.stack = stack
    for name, module in list(model.named_modules()):
        if type(module) is AdaptedHead:
            head = FusedHead(module, make, tied=tied)
            model.set_submodule(name, head)
            if not tied:
                packed[name] = head.packed
    return packed


class HalfRotary(nn.Module):
    """The model's rotary embedding in float32, without the half that repeats the other.

    step: what it gave last, by kind of layer where the model has several kinds.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.step: dict[str | None, tuple[Tensor, Tensor]] = {}

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos, sin: float32 [rows, half]."""
        like = torch.empty(0, dtype=torch.float32, device=x.device)
        kind = () if layer_type is None else (layer_type,)
        cos, sin = self.rotary(like, position_ids, *kind)
        half = cos.shape[-1] // 2
        self.step[layer_type] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self.step[layer_type]


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
        for where, weight in self._own_weights():
            rms_norm = step.kernels.rms_norm
            normed[where] = rms_norm(h[where], weight, self.eps, offset=self.offset)[0]
        return normed, h

    def heads(self, x: Tensor) -> Tensor:
        """Each head's norm by itself: [rows, heads * n]."""
        y = self._heads(x, self.weight)
        for where, weight in self._own_weights():
            y[where] = self._heads(x[where], weight)
        return y

    def _own_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Which rows have a weight of their adapter's, and that weight."""
        owned = self.step.overridden.get(self.module, ()) if self.step.overridden else ()
        return [(where, own.weight) for where, own in owned if own.weight is not None]

    def _heads(self, x: Tensor, weight: Tensor) -> Tensor:
        heads = x.reshape(-1, len(weight))
        return self.step.kernels.rms_norm(heads, weight, self.eps, offset=self.offset)[0].view(
            x.shape
        )


class FusedLayer(nn.Module):
    """One decoder layer over a flat batch."""

    def __init__(
        self,
        base: Any,
        attention: LayerAttention,
        gated: Gated,
        eps: float,
        step: StepState,
        make: MakeProduct,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.step = step
        self.gated = gated
        self.projections = tuple(Projection(group, step, make) for group in _groups(base))
        self.qkv, self.o, self.gate_up, self.down = self.projections
        self.rotary_kind: str | None = getattr(base.self_attn, "layer_type", None)
        offset = 1.0 if type(base) in GEMMA else 0.0

        def fused(norm: Any) -> FusedNorm:
            module = norm.module_id if isinstance(norm, AdaptedNorm) else -1
            return FusedNorm(norm.weight, module, eps, offset, step)

        norms: dict[str, FusedNorm] = {}
        for name, norm in base.named_children():
            if name.endswith("layernorm"):
                self.add_module(name, norm)
                norms[name] = fused(norm)
        self.self_attn = nn.Module()
        self.q_norm: FusedNorm | None = None
        self.k_norm: FusedNorm | None = None
        if hasattr(base.self_attn, "q_norm"):
            self.self_attn.q_norm, self.self_attn.k_norm = (
                base.self_attn.q_norm,
                base.self_attn.k_norm,
            )
            self.q_norm, self.k_norm = fused(base.self_attn.q_norm), fused(base.self_attn.k_norm)
        self.before_attention = norms["input_layernorm"]
        self.after_attention: FusedNorm | None = None
        self.before_mlp = norms["post_attention_layernorm"]
        self.after_mlp: FusedNorm | None = None
        if "pre_feedforward_layernorm" in norms:
            self.after_attention = norms["post_attention_layernorm"]
            self.before_mlp = norms["pre_feedforward_layernorm"]
            self.after_mlp = norms["post_feedforward_layernorm"]
        self.norms = (
            *(self.before_attention, self.after_attention, self.before_mlp, self.after_mlp),
            *(self.q_norm, self.k_norm),
        )
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
                stack.run_(x)
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
        if self.q_norm is not None and self.k_norm is not None:
            kv_size = call.kv_heads * call.head_dim
            q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=1)
            qkv = torch.cat([self.q_norm.heads(q), self.k_norm.heads(k), v], dim=1)
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
