"""Copies of the base's own parameters inside an adapter's file.

When an adapter targets `lm_head` or `embed_tokens`, or the trainer resized the vocabulary, peft
saves those modules' weights beside the adapter and puts them into the base when it loads it. The
base here is shared, so a copy is served only where it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.errors import FailedPrecondition

BaseParameter: TypeAlias = Callable[[str], torch.Tensor | None]
"""The base's parameter of that name ("lm_head.weight"), as transformers lays it out, on any
device; None if there is none."""


def check_base_copies(
    checkpoint: Checkpoint, copies: Mapping[str, str], parameter: BaseParameter | None
) -> None:
    """copies: the base's parameter → the tensor that copies it.

    Raises FailedPrecondition unless each, cast to the base's dtype as peft does, equals the base's.
    """
    for name, tensor in copies.items():
        field = f"{WEIGHTS_FILE}: {tensor}"
        base = None if parameter is None else parameter(name)
        if base is None:
            raise FailedPrecondition(
                "cannot compare this copy of a base parameter with the base's own",
                field=field,
                found=name,
                wanted="a file without it (save_pretrained(..., save_embedding_layers=False))",
            )
        shape = checkpoint.tensors[tensor].shape
        if shape != tuple(base.shape):
            raise FailedPrecondition(
                "the base's parameter has another shape",
                field=field,
                found=list(shape),
                wanted=str(list(base.shape)),
            )
        copy = checkpoint.load([tensor])[tensor]
        if not torch.equal(copy.to(base.dtype), base.detach().cpu()):
            raise FailedPrecondition(
                "the adapter replaces this parameter of the base, which is not served",
                field=field,
                found="other values than the base's",
                wanted="the base's own values, or none",
            )
