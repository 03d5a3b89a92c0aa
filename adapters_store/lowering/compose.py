"""Several adapters as one: the sum of their edits, each times its weight.

Exact for what adds to the base's result, low-rank parts and biases: the ranks add up, and B is
[w_1 s_1 B_1, w_2 s_2 B_2, …], where s are the adapters' own scales (peft's `add_weighted_adapter`
with `combination_type="cat"`). All else is refused: scaled or replaced weights, heads and tokens
of several adapters have no sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit
from manylora.adapters_store.head import Head
from manylora.adapters_store.limits import DEFAULT_LIMITS, Limits
from manylora.errors import FailedPrecondition

_NO_SUM = {
    "in_scale": "scaled inputs",
    "out_scale": "scaled outputs",
    "weight": "a weight of its own",
    "own_bias": "a bias of its own",
    "token_ids": "token embeddings of its own",
}


@dataclass(slots=True, frozen=True)
class Part:
    """name: for errors. weight: not zero."""

    name: str
    weight: float
    lowered: LoweredAdapter


def compose(parts: Sequence[Part], limits: Limits = DEFAULT_LIMITS) -> LoweredAdapter:
    """The sum. parts: at least one, all of the same base.

    Raises FailedPrecondition naming the part and what of it cannot be combined, or the module
    whose ranks add up to more than the limit.
    """
    for part in parts:
        _check(part)
    modules = dict.fromkeys(module for part in parts for module in part.lowered.edits)
    edits = {module: _add(module, parts) for module in modules}
    for module, edit in edits.items():
        if edit.rank > limits.max_rank:
            raise FailedPrecondition(
                "the adapters' ranks add up to too much",
                field="adapter",
                found=f"rank {edit.rank} of {module}",
                wanted=f"at most {limits.max_rank}",
            )
    return LoweredAdapter(edits, head=_common_head(parts))


def _check(part: Part) -> None:
    lowered = part.lowered
    if lowered.virtual_tokens is not None or lowered.prefix is not None:
        raise _refusal(part, "tokens before the prompt")
    if lowered.invocation:
        raise _refusal(part, "invocation tokens")
    for module, edit in lowered.edits.items():
        for word, found in _NO_SUM.items():
            if getattr(edit, word) is not None:
                raise _refusal(part, f"{found} in {module}")


def _refusal(part: Part, found: str) -> FailedPrecondition:
    return FailedPrecondition(
        "an adapter that cannot be combined with others, nor weighted",
        field=f"adapter: {part.name}",
        found=found,
        wanted="low-rank parts and biases alone",
    )


def _add(module: str, parts: Sequence[Part]) -> ModuleEdit:
    terms = [(p.weight, p.lowered.edits[module]) for p in parts if module in p.lowered.edits]
    total = ModuleEdit(on_gather=any(edit.on_gather for _, edit in terms))
    scales = [weight * edit.scale for weight, edit in terms if edit.rank]
    if scales:
        total.scale = max(scales, key=abs) or 1.0
        total.a = torch.cat([e.a.float() for _, e in terms if e.a is not None])
        factors = [scale / total.scale for scale in scales]
        bs = [e.b for _, e in terms if e.b is not None]
        stacked = [factor * b.double() for factor, b in zip(factors, bs, strict=True)]
        total.b = torch.cat(stacked, dim=1).float()
    biases = [weight * e.bias.double() for weight, e in terms if e.bias is not None]
    if biases:
        total.bias = torch.stack(biases).sum(dim=0).float()
    return total


def _common_head(parts: Sequence[Part]) -> Head | None:
    """What all parts were trained for; none may bring layers of its own for that."""
    first = parts[0].lowered.head
    for part in parts:
        head = part.lowered.head
        if head is not None and head.layers:
            raise _refusal(part, f"a head, {', '.join(head.layers)}")
        if (head and head.task) != (first and first.task):
            raise FailedPrecondition(
                "the adapters were trained for different tasks",
                field=f"adapter: {part.name}",
                found="CAUSAL_LM" if head is None else head.task.value,
                wanted="CAUSAL_LM" if first is None else first.task.value,
            )
    return first
