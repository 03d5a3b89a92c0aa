"""How a model calls attention: recorded in one forward pass, and compared with what we compute.

The functions here take the place of attention and mask in transformers' registries while a model
is probed. What our attention would not reproduce is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from manylora.errors import FailedPrecondition
from manylora.kernels import make_batch, reference
from manylora.server.engine.model.interface import TWINS
from manylora.server.engine.model.limits import max_context

PROBE = "manylora_probe"
"""Name of the recording attention and mask functions in transformers' registries."""

RECORD = "manylora_calls"
"""Attribute of an attention module that holds the calls recorded on it."""

_RECORDED = frozenset({"scaling", "softcap", "s_aux", "alibi_slopes"})
_HARMLESS = frozenset(
    {"dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"}
)
"""Keywords of an attention call that change nothing, or that our attention answers by itself: the
window is taken from the mask, which is what transformers' own eager attention goes by."""

_UNDERSTOOD = _RECORDED | _HARMLESS


_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest difference from transformers' eager attention, over its largest value: one operation's
rounding, with room."""


@dataclass(slots=True, frozen=True, eq=False)
class AttentionCall:
    """One attention layer, as it calls the attention interface.

    module: the attention module. window: keys a row sees, itself included; 0: all.
    softcap: 0 if none. slopes, sinks: float32 [heads].
    """

    module: nn.Module
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    slopes: Tensor | None
    sinks: Tensor | None


@dataclass(slots=True, frozen=True)
class _Mask:
    """Stands in for a mask: causal, over the last `window` keys, or over all if 0."""

    window: int


def _record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Keeps on the module how it called attention; answers as transformers' own attention does."""
    check_keywords(module, others)
    if not isinstance(attention_mask, _Mask):
        raise refuse(module, "has a mask of its own making")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise refuse(module, "has queries, keys and values of different head sizes")
    if query.shape[0] != 1 or key.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise refuse(module, "attends to other rows than the batch's")
    if query.shape[1] % key.shape[1]:
        raise refuse(module, "has heads that do not divide by its KV heads")
    if not (query.dtype == key.dtype == value.dtype == module_dtype(module, query.dtype)):
        raise refuse(module, "attends in another dtype than the model's")
    if not isinstance(scaling, float | int | None):
        raise refuse(module, "scales by a tensor")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise refuse(module, "is not causal")
    call = AttentionCall(
        module=module,
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        window=attention_mask.window,
        softcap=float(softcap or 0.0),
        slopes=_per_head(alibi_slopes),
        sinks=_per_head(s_aux),
    )
    vars(module).setdefault(RECORD, []).append(call)
    ours = _paged(call, query, key, value)
    if type(module) in TWINS:
        return ours, None
    keywords = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, **others}
    eager = _eager(module, query, key, value, attention_mask.window, keywords)
    difference = float((ours - eager).abs().max() / eager.abs().max().clamp_min(1e-6))
    if not difference <= _TOLERANCE[query.dtype]:
        raise refuse(module, "attends by another formula than ours")
    return eager, None


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    keywords: Mapping[str, object],
) -> Tensor:
    """What the model's own eager attention gives for one sequence: [1, rows, heads, head_dim]."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise refuse(module, "has no eager attention to compare with")
    positions = torch.arange(query.shape[2], device=query.device)
    behind = positions[:, None] - positions
    hidden = (behind < 0) | (behind >= (window or len(positions)))
    mask = torch.zeros_like(behind, dtype=query.dtype).masked_fill(
        hidden, torch.finfo(query.dtype).min
    )
    given = {name: v for name, v in keywords.items() if v is not None}
    out: Tensor = eager(module, query, key, value, mask[None, None], **given)[0]
    return out


def _paged(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What our attention gives for the same, through a cache of one block."""
    rows = query.shape[2]
    count = np.array([rows], np.int32)
    batch = make_batch(count, count, np.zeros((1, 1), np.int32), rows, query.device)
    cache = key.new_empty(2, 1, call.kv_heads, rows, call.head_dim)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    reference.write_kv(k, v, cache[0], cache[1], batch)
    out = reference.paged_attention(
        q,
        cache[0],
        cache[1],
        batch,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        slopes=call.slopes,
        sinks=call.sinks,
    )
    return out[None]


def check_keywords(module: nn.Module, keywords: Mapping[str, object]) -> None:
    """Raises FailedPrecondition if attention is asked for something that it does not do."""
    for name in keywords.keys() - _UNDERSTOOD:
        if keywords[name] is not None and keywords[name] is not False:
            raise refuse(module, f"passes {name} to attention")


def module_dtype(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Of the module's first parameter that is not quantised, if it has any."""
    found = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(found, otherwise)


def _per_head(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().reshape(-1).contiguous()


def _record_mask(
    *, mask_function: Callable[..., Tensor], config: PreTrainedConfig, **_: object
) -> _Mask:
    """A mask function that tells what `mask_function(batch, head, query, key)` lets through."""
    window = causal_window(mask_function, max_context(config))
    if window is None:
        raise FailedPrecondition(
            f"{config.model_type} cannot be served: its attention is neither causal nor "
            "sliding-window causal",
            field="model",
        )
    return _Mask(window)


def causal_window(mask_function: Callable[..., Tensor], positions: int) -> int | None:
    """The window of a causal mask (0: no limit within `positions`), or None if it is not one.

    Asked at positions from the first to the last, so that chunks and windows of any size show.
    """

    def seen(query: int) -> Tensor:
        """bool [keys]: what the query sees, up to two keys beyond itself."""
        keys = torch.arange(query + 3)[None]
        zero = torch.zeros(1, 1, dtype=torch.long)
        return mask_function(zero, zero, torch.tensor([[query]]), keys).expand_as(keys)[0]

    last = positions - 1
    window = int(seen(last).sum())
    for query in {0, 1, 2, last // 3, last // 2, last - 1, last}:
        keys = torch.arange(query + 3)
        if not torch.equal(seen(query), (keys <= query) & (keys > query - window)):
            return None
    return 0 if window == positions else window


def refuse(module: nn.Module, why: str) -> FailedPrecondition:
    layer = getattr(module, "layer_idx", "?")
    return FailedPrecondition(
        f"{type(module).__name__} of layer {layer} cannot be served: it {why}", field="model"
    )


AttentionInterface.register(PROBE, _record_attention)
AttentionMaskInterface.register(PROBE, _record_mask)
