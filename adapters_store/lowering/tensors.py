"""The tensors of a checkpoint's file, sorted by the names that peft gives them.

`base_model.model.<module>.lora_A.weight`; the prefix is absent in files that transformers saved,
and the adapter's name stands after `lora_A` in files that are a model's whole state.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.errors import FailedPrecondition, InvalidArgument

PREFIX = "base_model.model."
_SHARED_PREFIX = "base_model."
_BASE_LAYER = ".base_layer"
_COPY = re.compile(r"(?P<module>.+)\.(?P<parameter>weight|bias)")
_METHOD_TENSOR = re.compile(
    r"(?:^|\.)(lora_[A-Za-z_]+|modules_to_save|token_adapter|trainable_tokens_\w+)"
)


@dataclass(slots=True, frozen=True)
class Names:
    """What one method calls its tensors.

    parts: of a module, as "lora_A.weight"; the adapter's name may stand after the first word. None
    where all tensors are shared.
    shared: of the whole adapter. numbered: lists of such, "v" for v.0, v.1 …
    """

    parts: Collection[str]
    shared: Collection[str] = ()
    numbered: Collection[str] = ()


@dataclass(slots=True, frozen=True)
class Copy:
    """A tensor under the name of a parameter of the base. inside: as of an adapted module."""

    tensor: str
    inside: bool


@dataclass(slots=True, frozen=True)
class FileParts:
    """Tensors' names in the file: by module and part, by shared name, by the base's parameter."""

    modules: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    copies: Mapping[str, Copy]


def read_parts(checkpoint: Checkpoint, names: Names) -> FileParts:
    """Sorts all the file's tensors.

    Raises FailedPrecondition for a tensor of any other kind, InvalidArgument for two of one
    meaning and for more adapters than one.
    """
    part_pattern = re.compile(rf"(?P<module>.+)\.(?:{_any_of(names.parts)})")
    shared_pattern = re.compile(rf"(?:{_any_of(names.shared)})")
    numbered_pattern = re.compile(
        rf"(?P<part>{'|'.join(map(re.escape, names.numbered))})"
        r"(?:\.(?P<adapter>[^.]+))?\.(?P<index>\d+)"
    )
    modules: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    copies: dict[str, Copy] = {}
    adapters: set[str | None] = set()
    for tensor in checkpoint.tensors:
        name = tensor.removeprefix(PREFIX)
        if names.shared and (match := shared_pattern.fullmatch(name.removeprefix(_SHARED_PREFIX))):
            part, adapter = _part_and_adapter(match, names.shared)
            _put(shared, part, tensor)
        elif names.numbered and (
            match := numbered_pattern.fullmatch(name.removeprefix(_SHARED_PREFIX))
        ):
            adapter = match["adapter"]
            _put(shared, f"{match['part']}.{match['index']}", tensor)
        elif match := part_pattern.fullmatch(name):
            part, adapter = _part_and_adapter(match, names.parts)
            _put(modules.setdefault(match["module"], {}), part, tensor)
        else:
            parameter, inside = _copied_parameter(tensor, name, names)
            if parameter in copies:
                raise _twice(tensor, copies[parameter].tensor)
            copies[parameter] = Copy(tensor, inside)
            continue
        adapters.add(adapter)
    if (names.parts and not modules) or len(adapters) != 1:
        raise InvalidArgument(
            "the file must hold the tensors of one adapter",
            field=WEIGHTS_FILE,
            found=f"{len(adapters)} adapters",
        )
    return FileParts(modules, shared, copies)


def _any_of(parts: Iterable[str]) -> str:
    """A pattern of all parts, group p<number> for each and a<number> for the adapter's name."""
    patterns = []
    for i, part in enumerate(parts):
        word, dot, leaf = part.partition(".")
        adapter = rf"(?:\.(?P<a{i}>[^.]+))?"
        if word == "lora_magnitude_vector":  # a module of its own since peft 0.12
            adapter = rf"(?:\.(?P<a{i}>[^.]+?)(?:\.weight)?)?"
        patterns.append(rf"(?P<p{i}>{re.escape(word)}){adapter}{re.escape(dot + leaf)}")
    return "|".join(patterns)


def _part_and_adapter(match: re.Match[str], parts: Iterable[str]) -> tuple[str, str | None]:
    for i, part in enumerate(parts):
        if match[f"p{i}"] is not None:
            return part, match[f"a{i}"]
    raise AssertionError(match)


def _copied_parameter(tensor: str, name: str, names: Names) -> tuple[str, bool]:
    """The base's parameter that the tensor copies: peft adds the weights of a targeted lm_head,
    and trained biases. And whether it is named as the parameter of an adapted module."""
    match = _COPY.fullmatch(name)
    words = {part.partition(".")[0] for part in (*names.parts, *names.shared, *names.numbered)}
    if match is None or _METHOD_TENSOR.search(name) or words & set(name.split(".")):
        raise FailedPrecondition(
            "tensors of this kind are not served",
            field=f"{WEIGHTS_FILE}: {tensor}",
            wanted=f"{' and '.join(names.parts or names.shared)} of Linear or Conv1D modules",
        )
    module = match["module"]
    inside = module.endswith(_BASE_LAYER)
    return f"{module.removesuffix(_BASE_LAYER)}.{match['parameter']}", inside


def _put(tensors: dict[str, str], part: str, tensor: str) -> None:
    if part in tensors:
        raise _twice(tensor, tensors[part])
    tensors[part] = tensor


def _twice(tensor: str, other: str) -> InvalidArgument:
    return InvalidArgument(
        "two tensors of one meaning", field=f"{WEIGHTS_FILE}: {tensor}", found=other
    )
