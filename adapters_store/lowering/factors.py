"""The low-rank factors in a checkpoint's file, found by the names that peft gives them.

`base_model.model.<module>.lora_A.weight`; the prefix is absent in files that transformers saved,
and the adapter's name stands before `weight` in files that are a model's whole state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.errors import FailedPrecondition, InvalidArgument

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_COPY = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.(?P<parameter>weight|bias)")
_METHOD_TENSOR = re.compile(
    r"(?:^|\.)(lora_[A-Za-z_]+|modules_to_save|token_adapter|trainable_tokens_\w+)"
)


@dataclass(slots=True)
class Factors:
    """One module's tensors, by their names in the file; "" where absent."""

    a: str = ""
    b: str = ""


@dataclass(slots=True, frozen=True)
class FileParts:
    factors: Mapping[str, Factors]
    copies: Mapping[str, str]  # the base's parameter → the tensor that copies it


def read_parts(checkpoint: Checkpoint) -> FileParts:
    """Sorts all the file's tensors into factors by module, and copies of the base's parameters.

    Raises FailedPrecondition for a tensor of any other kind, InvalidArgument for two of one
    meaning and for more adapters than one.
    """
    factors: dict[str, Factors] = {}
    copies: dict[str, str] = {}
    adapters: set[str | None] = set()
    for tensor in checkpoint.tensors:
        name = tensor.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match is None:
            parameter = _copied_parameter(tensor, name)
            _refuse_twice(tensor, copies.get(parameter))
            copies[parameter] = tensor
            continue
        adapters.add(match["adapter"])
        names = factors.setdefault(match["module"], Factors())
        if match["side"] == "A":
            _refuse_twice(tensor, names.a)
            names.a = tensor
        else:
            _refuse_twice(tensor, names.b)
            names.b = tensor
    if len(adapters) != 1:
        raise InvalidArgument(
            "the file must hold one adapter's lora_A and lora_B",
            field=WEIGHTS_FILE,
            found=f"{len(adapters)} adapters",
        )
    return FileParts(factors, copies)


def _copied_parameter(tensor: str, name: str) -> str:
    """The base's parameter that the tensor copies: peft adds the weights of a targeted lm_head."""
    match = _COPY.fullmatch(name)
    if match is None or _METHOD_TENSOR.search(name):
        raise FailedPrecondition(
            "tensors of this kind are not served",
            field=f"{WEIGHTS_FILE}: {tensor}",
            wanted="lora_A.weight and lora_B.weight of Linear or Conv1D modules",
        )
    return f"{match['module']}.{match['parameter']}"


def _refuse_twice(tensor: str, other: str | None) -> None:
    if other:
        raise InvalidArgument(
            "two tensors of one meaning", field=f"{WEIGHTS_FILE}: {tensor}", found=other
        )
