"""What a model does in a forward pass, seen by running one: the facts that the passes rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.errors import FailedPrecondition
from manylora.server.engine.model.adapt import linear_kind
from manylora.server.engine.model.probe_others import watch_others
from manylora.server.engine.model.quantised import is_quantised
from manylora.server.engine.model.record import PROBE, RECORD, AttentionCall, refuse

_ROWS = 13


@dataclass(slots=True, frozen=True)
class Probe:
    """attention: the layers, in the tree's order. rowwise: names of the Linear and Conv1D modules
    that are given exactly the flat batch's rows; the head is not among them. others: of the norms
    that treat each row by itself, and of the input embedding."""

    attention: list[AttentionCall]
    rowwise: list[str]
    others: list[str]


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
        counting, watching = counting_rows(model), watch_others(model, _ROWS)
        with torch.inference_mode(), counting as rows, watching as others:
            model(input_ids=ids, position_ids=ids, use_cache=False)
        return Probe(_attention_calls(model), _rowwise(model, rows, head), others())
    finally:
        model.config._attn_implementation = implementation
        for module in model.modules():
            vars(module).pop(RECORD, None)


@contextmanager
def counting_rows(model: PreTrainedModel) -> Iterator[dict[str, set[int]]]:
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
        if linear_kind(module)
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
        and (is_quantised(module) or module.weight.dtype == model.dtype)
    ]


def _attention_calls(model: PreTrainedModel) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    for module in model.modules():
        records: list[AttentionCall] = vars(module).get(RECORD, [])
        if len(records) > 1:
            raise refuse(module, "attends more than once in one forward pass")
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
