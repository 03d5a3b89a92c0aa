"""A last look at load: the adapted model against the model as transformers runs it.

Two sequences in two chunks each, through one flat batch and a paged cache, must give what each
gives by itself. It is coarse, so that rounding passes, but whatever mixes the rows of a flat
batch (a convolution, a recurrence, positions counted from the batch's start) does not.
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

_LENGTH = 6
_CUTS = ((0, 4, 6), (0, 3, 6))
_BLOCK = 16
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""Largest relative error (2-norm) of a row of logits."""


@torch.inference_mode()
def expected_logits(model: PreTrainedModel) -> Tensor:
    """float32 [2, length, vocab], from the model as it was loaded, with positions of its own."""
    output = model(input_ids=_sequences(model.device), use_cache=False)
    logits: Tensor = output.logits.float()
    return logits


@torch.inference_mode()
def check(adapted: AdaptedModel, expected: Tensor) -> None:
    """Raises FailedPrecondition unless the adapted model's logits are the expected ones."""
    name = type(adapted.model).__name__
    if not bool(expected.isfinite().all()):
        raise FailedPrecondition(
            f"the logits of {name} are not finite in {adapted.dtype}",
            field="dtype",
            wanted="bfloat16 or float32",
        )
    adapted.attach_cache([_cache(adapted, *shape) for shape in adapted.kv_layout])
    for part in range(2):
        logits = adapted.forward(_inputs(part, adapted.device))
        wanted = torch.stack([expected[s, _CUTS[s][part + 1] - 1] for s in range(2)])
        error = float(((logits - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-6)).max())
        if not error <= _TOLERANCE[adapted.dtype]:
            raise FailedPrecondition(
                f"{name} cannot be served: in a batch its logits differ from those of each "
                "sequence by itself",
                field="model",
                found=f"relative error {error:.2g}",
                wanted=f"at most {_TOLERANCE[adapted.dtype]}",
            )


def _sequences(device: torch.device) -> Tensor:
    return torch.arange(2 * _LENGTH, device=device).view(2, _LENGTH) + 3


def _inputs(part: int, device: torch.device) -> StepInputs:
    """The rows of both sequences' chunk `part`."""
    spans = [(cuts[part], cuts[part + 1]) for cuts in _CUTS]
    counts = np.array([end - start for start, end in spans], np.int32)
    context = np.array([end for _, end in spans], np.int32)
    ids = _sequences(device)
    none = np.full(int(counts.sum()), -1, np.int32)
    return StepInputs(
        token_ids=torch.cat([ids[s, a:b] for s, (a, b) in enumerate(spans)]),
        positions=torch.cat([torch.arange(a, b, device=device) for a, b in spans]),
        plan=make_plan(none, device),
        head_plan=make_plan(none[:2], device),
        attention=make_batch(counts, context, np.array([[1], [0]], np.int32), _BLOCK, device),
        sample_rows=torch.from_numpy(np.cumsum(counts, dtype=np.int64) - 1).to(device),
    )


def _cache(adapted: AdaptedModel, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    shape = (2, kv_heads, _BLOCK, head_dim)
    cache = torch.zeros(2, *shape, dtype=adapted.dtype, device=adapted.device)
    return cache[0], cache[1]
