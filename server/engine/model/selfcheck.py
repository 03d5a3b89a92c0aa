"""A last look at load: each row of a flat batch must stand by itself, at the position it is given.

The same batch is run with something changed in one of its two sequences. Shapes stay, so the
arithmetic does too, and the other sequence's logits must be equal bit for bit, in any dtype.
Whatever mixes rows beside attention (a convolution, a recurrence, a norm over the batch) shows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from manylora.errors import FailedPrecondition
from manylora.kernels import make_batch, make_plan
from manylora.server.engine.model.adapted import AdaptedModel
from manylora.server.engine.model.step import StepInputs

_LENGTHS = (7, 6)
_FIRST, _SECOND = slice(0, 7), slice(7, 13)
_BLOCK = 16
_EXPERTS_TOLERANCE = 0.3
"""Relative error (2-norm of a row of logits) allowed where rows share experts: how many rows an
expert gets decides how its products are rounded."""


@torch.inference_mode()
def check_positions(model: PreTrainedModel) -> None:
    """Raises FailedPrecondition unless transformers' own positions are 0, 1, 2 …

    The model is as transformers loaded it. Infinite or NaN logits are refused, too.
    """
    ids = _tokens(model, 0)[None]
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    by_default = model(input_ids=ids, use_cache=False).logits
    if not bool(by_default.isfinite().all()):
        raise FailedPrecondition(
            f"the logits of {type(model).__name__} are not finite in {model.dtype}",
            field="dtype",
            wanted="bfloat16 or float32",
        )
    explicit = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    if not torch.equal(by_default, explicit):
        raise _refuse(model, "does not count positions from 0")


@torch.inference_mode()
def check_rows(adapted: AdaptedModel) -> None:
    """Raises FailedPrecondition if rows depend on each other or not on their positions."""
    model = adapted.model
    adapted.attach_cache([_cache(adapted, *shape) for shape in adapted.kv_layout])
    tokens, others = _tokens(model, 0), _tokens(model, 1)
    positions = torch.cat([torch.arange(n, device=model.device) for n in _LENGTHS])
    swapped = torch.cat([others[_FIRST], tokens[_SECOND]])
    stretched = torch.cat([2 * positions[_FIRST], positions[_SECOND]])

    logits = adapted.forward(_inputs(tokens, positions))
    beside_others = adapted.forward(_inputs(swapped, positions))
    elsewhere = adapted.forward(_inputs(tokens, stretched))
    for changed in (beside_others, elsewhere):
        if not _same(logits[_SECOND], changed[_SECOND], _has_experts(model)):
            raise _refuse(model, "mixes the sequences of a batch")
    has_slopes = all(layer.call.slopes is not None for layer in adapted.layers)
    if not has_slopes and torch.equal(logits[_FIRST], elsewhere[_FIRST]):
        raise _refuse(model, "ignores the positions that it is given")


def _same(one: Tensor, other: Tensor, experts: bool) -> bool:
    if not experts:
        return torch.equal(one, other)
    return bool(((one - other).norm(dim=1) <= _EXPERTS_TOLERANCE * one.norm(dim=1)).all())


def _has_experts(model: PreTrainedModel) -> bool:
    return any("experts" in name.split(".") for name, _ in model.named_modules())


def _tokens(model: PreTrainedModel, seed: int) -> Tensor:
    """int64 [rows of both sequences], from anywhere in the vocabulary."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (sum(_LENGTHS),), generator=generator).to(model.device)


def _inputs(tokens: Tensor, positions: Tensor) -> StepInputs:
    """Both sequences from their start, every row sampled."""
    device = tokens.device
    counts = np.array(_LENGTHS, np.int32)
    plan = make_plan(np.full(len(tokens), -1, np.int32), device)
    return StepInputs(
        token_ids=tokens,
        positions=positions,
        plan=plan,
        head_plan=plan,
        attention=make_batch(counts, counts, np.array([[1], [0]], np.int32), _BLOCK, device),
        sample_rows=torch.arange(len(tokens), device=device),
    )


def _cache(adapted: AdaptedModel, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    shape = (2, kv_heads, _BLOCK, head_dim)
    cache = torch.zeros(2, *shape, dtype=adapted.dtype, device=adapted.device)
    return cache[0], cache[1]


def _refuse(model: PreTrainedModel, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"{type(model).__name__} cannot be served: it {why}", field="model")
