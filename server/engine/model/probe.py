"""What a model does in a forward pass, seen by running one: the facts that the passes rest on.

Every attention layer is recorded as it calls transformers' attention interface, and every
Linear by the rows it is given. Whatever cannot be reproduced exactly is refused here by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from manylora.errors import FailedPrecondition
from manylora.server.engine.model.adapt import KINDS
from manylora.server.engine.model.limits import max_context

PROBE = "manylora_probe"
"""Name of the recording attention and mask functions in transformers' registries."""

_RECORD = "manylora_probe_calls"
_ROWS = 13

_RECORDED = frozenset({"scaling", "softcap", "s_aux", "alibi_slopes"})
_HARMLESS = frozenset(
    {"dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"}
)
"""Keywords of an attention call that change nothing, or that our attention answers by itself: the
window is taken from the mask, which is what transformers' own eager attention goes by."""

_UNDERSTOOD = _RECORDED | _HARMLESS


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
class Probe:
    """attention: the layers, in the tree's order. rowwise: names of the Linear and Conv1D modules
    that are given exactly the flat batch's rows; the head is not among them."""

    attention: list[AttentionCall]
    rowwise: list[str]


@dataclass(slots=True, frozen=True)
class _Mask:
    """Stands in for a mask: causal, over the last `window` keys, or over all if 0."""

    window: int


def probe(model: PreTrainedModel, head: str) -> Probe:
    """Runs one forward pass of `model` and reports what its modules did.

    Raises:
        FailedPrecondition: naming the module that cannot be served exactly, and why.
    """
    device = next(model.parameters()).device
    ids = torch.arange(_ROWS, device=device)[None]
    implementation = model.config._attn_implementation
    model.config._attn_implementation = PROBE
    try:
        with torch.inference_mode(), _counting_rows(model) as rows:
            model(input_ids=ids, position_ids=ids, use_cache=False)
        return Probe(_attention_calls(model), _rowwise(model, rows, head))
    finally:
        model.config._attn_implementation = implementation
        for module in model.modules():
            vars(module).pop(_RECORD, None)


@contextmanager
def _counting_rows(model: PreTrainedModel) -> Iterator[dict[str, set[int]]]:
    """Row counts of the inputs that each Linear and Conv1D sees meanwhile."""
    rows: dict[str, set[int]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            rows.setdefault(name, set()).add(x.numel() // x.shape[-1])

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if type(module) in KINDS
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _rowwise(model: PreTrainedModel, rows: dict[str, set[int]], head: str) -> list[str]:
    """In the tree's order. An expert that happened to be given all rows is still left out."""
    return [
        name
        for name, module in model.named_modules()
        if rows.get(name) == {_ROWS}
        and name != head
        and "experts" not in name.split(".")
        and module.weight.dtype == model.dtype
    ]


def _attention_calls(model: PreTrainedModel) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    for module in model.modules():
        records: list[AttentionCall] = vars(module).get(_RECORD, [])
        if len(records) > 1:
            raise _refuse(module, "attends more than once in one forward pass")
        calls += records
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(calls) != wanted:
        raise FailedPrecondition(
            f"{type(model).__name__} cannot be served: not each of its layers is plain attention "
            "through transformers' attention interface",
            field="model",
            found=f"{len(calls)} attention layers",
            wanted=str(wanted),
        )
    return calls


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
    """An attention function that attends to nothing and keeps how it was called on the module."""
    check_keywords(module, others)
    if not isinstance(attention_mask, _Mask):
        raise _refuse(module, "has a mask of its own making")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise _refuse(module, "has queries, keys and values of different head sizes")
    if query.shape[0] != 1 or query.shape[2] != _ROWS or key.shape[2] != _ROWS:
        raise _refuse(module, "attends to other rows than the batch's")
    if query.shape[1] % key.shape[1]:
        raise _refuse(module, "has heads that do not divide by its KV heads")
    if not (query.dtype == key.dtype == value.dtype == module_dtype(module)):
        raise _refuse(module, "attends in another dtype than the model's")
    if not isinstance(scaling, float | int | None):
        raise _refuse(module, "scales by a tensor")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise _refuse(module, "is not causal")
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
    vars(module).setdefault(_RECORD, []).append(call)
    return torch.zeros_like(query).transpose(1, 2), None


def check_keywords(module: nn.Module, keywords: Mapping[str, object]) -> None:
    """Raises FailedPrecondition if attention is asked for something that it does not do."""
    for name in keywords.keys() - _UNDERSTOOD:
        if keywords[name] is not None and keywords[name] is not False:
            raise _refuse(module, f"passes {name} to attention")


def module_dtype(module: nn.Module) -> torch.dtype:
    """Of the module's first parameter."""
    return next(module.parameters()).dtype


def _per_head(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().reshape(-1).contiguous()


def _record_mask(
    *, mask_function: Callable[..., Tensor], config: PreTrainedConfig, **_: object
) -> _Mask:
    """A mask function that tells what `mask_function(batch, head, query, key)` lets through."""
    window = _window(mask_function, max_context(config))
    if window is None:
        raise FailedPrecondition(
            f"{config.model_type} cannot be served: its attention is neither causal nor "
            "sliding-window causal",
            field="model",
        )
    return _Mask(window)


def _window(mask_function: Callable[..., Tensor], positions: int) -> int | None:
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


def _refuse(module: nn.Module, why: str) -> FailedPrecondition:
    layer = getattr(module, "layer_idx", "?")
    return FailedPrecondition(
        f"{type(module).__name__} of layer {layer} cannot be served: it {why}", field="model"
    )


AttentionInterface.register(PROBE, _record_attention)
AttentionMaskInterface.register(PROBE, _record_mask)
