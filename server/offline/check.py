"""Is what is served for an adapter what peft computes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manylora import kernels
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import DEFAULT_LIMITS
from manylora.adapters_store.lowering import check_config, read_task
from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.server.engine.model import load_base
from manylora.server.engine.model.checkpoint import DTYPES
from manylora.server.engine.packing import pack
from manylora.server.engine.prefix import check_prefix
from manylora.server.engine.tokenizer import Tokenizer
from manylora.server.offline.alone import run_alone
from manylora.server.offline.peft_side import load_peft, read_adapter, read_base, run_peft

TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Of the largest logit, or of 1: by dtype, how far two right answers may be apart."""


@dataclass(slots=True, frozen=True)
class Comparison:
    """difference: the largest between any two logits (for FEATURE_EXTRACTION: hidden values).
    size: of the largest of peft's. effect: the largest difference that the adapter makes to the
    base, by peft; None where the base cannot answer without it."""

    task: str
    tokens: int
    difference: float
    size: float
    effect: float | None
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance * max(1.0, self.size)  # NaN is not


def compare(
    base: Path,
    adapter: Path,
    prompt: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tolerance: float | None = None,
) -> Comparison:
    """Runs the prompt through our model and through peft's, one after the other.

    dtype: of both; device: of ours. tolerance: None for the dtype's own of `TOLERANCES`.

    Raises:
        InvalidArgument, FailedPrecondition: the base or the adapter is not served; or the prompt
            does not fit.
        MissingExtra: peft is not installed.
    """
    if dtype not in DTYPES:
        raise InvalidArgument("no such dtype", field="dtype", found=dtype, wanted=", ".join(DTYPES))
    checkpoint = read_adapter(adapter, read_base(base))
    check_config(checkpoint, DEFAULT_LIMITS)
    task = read_task(checkpoint.config)
    ids = Tokenizer(base).encode(prompt).ids
    served = _run_served(base, checkpoint, ids, dtype, torch.device(device))
    model = load_peft(base, checkpoint, DTYPES[dtype])
    try:
        right = run_peft(model, task, ids)
    except Exception as error:  # peft raises what it likes
        raise FailedPrecondition(f"peft cannot run it: {error}", field="adapter") from error
    effect = None
    if task.value == "CAUSAL_LM":
        with model.disable_adapter():
            effect = _largest(run_peft(model.get_base_model(), task, ids) - right)
    return Comparison(
        task=task.value,
        tokens=len(ids),
        difference=_largest(served - right),
        size=_largest(right),
        effect=effect,
        tolerance=TOLERANCES[dtype] if tolerance is None else tolerance,
    )


def _run_served(
    base: Path, checkpoint: Checkpoint, ids: Sequence[int], dtype: str, device: torch.device
) -> Tensor:
    backend = kernels.select(device)
    model = load_base(base, dtype, device, backend)
    if not 0 < len(ids) < model.max_context:
        raise InvalidArgument(
            "does not fit the context",
            field="prompt",
            found=f"{len(ids)} tokens",
            wanted=f"1 to {model.max_context - 1}",
        )
    lowered = model.lower(checkpoint)
    check_prefix(lowered, model, model.max_context)
    names = {name: i for i, name in enumerate(model.modules)}
    packed = pack(lowered, names, backend, model.dtype)
    return run_alone(model, packed, read_task(checkpoint.config), ids)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
