"""Attention modules of transformers that do not call its attention interface, made to call it.

Their parameters, names and arithmetic stay; only the part from q, k, v to the mixed values goes
through the interface, as in all newer models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from manylora.errors import FailedPrecondition


class InterfacedBloomAttention(BloomAttention):  # type: ignore[misc]
    """BLOOM's attention; its ALiBi slopes go to the interface as `alibi_slopes` float32 [heads]."""

    config: Any
    slopes: Tensor

    def forward(
        self, hidden_states: Tensor, residual: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        mixed = _attend(self, q, k, v, kwargs, self.inv_norm_factor, self.slopes)
        return self.dense(mixed) + residual, None


class InterfacedFalconAttention(FalconAttention):  # type: ignore[misc]
    """Falcon's attention with rotary positions. KV heads are kept, not repeated."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        q, k, v = self._split_kv(self.query_key_value(hidden_states))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        return self.dense(_attend(self, q, k, v, kwargs, self.inv_norm_factor)), None

    def _split_kv(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, rows, out] → q [1, heads, rows, head_dim], k and v [1, kv_heads, rows, head_dim]."""
        if not self.new_decoder_architecture:
            q, k, v = self._split_heads(fused)
        else:
            grouped = fused.view(*fused.shape[:2], self.num_kv_heads, -1, self.head_dim)
            q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


TWINS: frozenset[type[nn.Module]] = frozenset({InterfacedBloomAttention, InterfacedFalconAttention})


def make_interfaced(model: PreTrainedModel) -> None:
    """Turns the attention modules of a BLOOM or Falcon model into those above; others stay.

    Raises:
        FailedPrecondition: a Falcon with ALiBi, whose table transformers rounds to bfloat16, so
            that it is not a slope times a position.
    """
    for module in model.modules():
        if type(module) is BloomAttention:
            module.__class__ = InterfacedBloomAttention
            module.config = model.config
            module.slopes = _get_alibi_slopes(module.num_heads, model.device)
        elif type(module) is FalconAttention:
            if model.config.alibi:
                raise FailedPrecondition("Falcon with ALiBi is not served", field="model")
            module.__class__ = InterfacedFalconAttention


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kwargs: dict[str, Any],
    scale: float,
    slopes: Tensor | None = None,
) -> Tensor:
    """[1, rows, heads * head_dim] of q [1, heads, rows, head_dim] over k, v."""
    attention = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    mixed: Tensor
    mixed, _ = attention(
        module, q, k, v, kwargs.get("attention_mask"), scaling=scale, alibi_slopes=slopes
    )
    return mixed.flatten(2)
