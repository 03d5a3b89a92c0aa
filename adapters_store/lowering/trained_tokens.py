"""Trained tokens: some rows of the embedding, and of a head that is tied to it, are replaced.

peft's `tuners/trainable_tokens`, by itself (TRAINABLE_TOKENS) or beside LoRA
(`trainable_token_indices`): the tensor `trainable_tokens_delta` holds the rows themselves, in the
order of the config's token ids. A head tied to the embedding gets the embedding's rows, unless the
config gives it tokens of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering.base_copies import BaseParameter
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys, whole_number
from manylora.adapters_store.lowering.method import Family
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.targets import Targets, read_targets
from manylora.adapters_store.lowering.tensors import PREFIX
from manylora.adapters_store.lowering.tied import tied_modules
from manylora.errors import FailedPrecondition, InvalidArgument

BESIDE = "trainable_token_indices"
_ALONE = "token_indices"
_DELTA = "trainable_tokens_delta"
_TENSOR = re.compile(rf"(?P<module>.+?)\.(?P<beside>token_adapter\.)?{_DELTA}(?:\.[^.]+)?")
_MOST = 1 << 31
_KEYS = KnownKeys(understood=(_ALONE, "target_modules"), harmless=("init_weights",), off={})


@dataclass(slots=True, frozen=True)
class _Trained:
    """One module's tokens. tensor: its name in the file, [tokens, hidden]."""

    tensor: str
    ids: Sequence[int]


@dataclass(slots=True, frozen=True)
class Tokens:
    """Token ids as LoRA's config gives them, by ends of modules' names; "" for the embedding."""

    by_name: Mapping[str, Sequence[int]]

    def of(self, module: str, embedding: bool) -> Sequence[int] | None:
        """A module's; peft wraps every module whose name ends so."""
        for name, ids in self.by_name.items():
            if module.endswith(name) if name else embedding:
                return ids
        return None


@dataclass(slots=True, frozen=True)
class BesideLora:
    """A family whose config may also have `trainable_token_indices`."""

    family: Family

    @property
    def keys(self) -> KnownKeys:
        return replace(self.family.keys, understood=(*self.family.keys.understood, BESIDE))

    def check(self, checkpoint: Checkpoint, limits: Limits) -> int:
        rest, tensors = _split(checkpoint, beside=True)
        _read_beside(checkpoint, tensors)
        return self.family.check(rest, limits)

    def lower(
        self,
        checkpoint: Checkpoint,
        modules: Mapping[str, ModuleShape],
        parameter: BaseParameter | None,
    ) -> LoweredAdapter:
        rest, tensors = _split(checkpoint, beside=True)
        tokens = _read_beside(checkpoint, tensors)
        lowered = self.family.lower(rest, modules, parameter)
        wanted: dict[str, Sequence[int]] = {}
        for module, shape in modules.items():
            ids = tokens.of(module, shape.kind is ModuleKind.EMBEDDING)
            if ids is not None:
                wanted[module] = ids
        tied = {
            head: ids
            for module, ids in wanted.items()
            for head in tied_modules(module, modules)
            if wanted.get(head, ids) == ids
        }
        own = {module: ids for module, ids in wanted.items() if module not in tied}
        edits = _edits(checkpoint, tensors, own, tied, modules, parameter)
        for module in edits.keys() & lowered.edits.keys():
            raise FailedPrecondition(
                "a module's tokens were trained, and the module itself",
                field=f"{CONFIG_FILE}: {BESIDE}",
                found=module,
            )
        return replace(lowered, edits={**lowered.edits, **edits})


class Alone:
    """TRAINABLE_TOKENS."""

    keys = _KEYS

    def check(self, checkpoint: Checkpoint, limits: Limits) -> int:  # noqa: ARG002
        _read_alone(checkpoint)
        return 0

    def lower(
        self,
        checkpoint: Checkpoint,
        modules: Mapping[str, ModuleShape],
        parameter: BaseParameter | None,
    ) -> LoweredAdapter:
        targets, ids, tensors = _read_alone(checkpoint)
        found = [name for name, shape in modules.items() if targets.match(name, shape.kind)]
        tied = {head: ids for module in found for head in tied_modules(module, modules)}
        own = {module: ids for module in found if module not in tied}
        return LoweredAdapter(edits=_edits(checkpoint, tensors, own, tied, modules, parameter))


def _read_alone(
    checkpoint: Checkpoint,
) -> tuple[Targets, Sequence[int], Mapping[str, str]]:
    """Targets, token ids, and the file's tensors by module."""
    reader = ConfigReader(checkpoint.config)
    reader.check_keys(_KEYS)
    targets = read_targets(reader, Matcher())
    ids = _read_ids(checkpoint.config.get(_ALONE), _ALONE)
    rest, tensors = _split(checkpoint, beside=False)
    if rest.tensors or not tensors:
        raise FailedPrecondition(
            "tensors of this kind are not served",
            field=f"{WEIGHTS_FILE}: {next(iter(rest.tensors), 'empty')}",
            wanted=_DELTA,
        )
    for tensor in tensors.values():
        _check_rows(checkpoint, _Trained(tensor, ids), None)
    return targets, ids, tensors


def _read_beside(checkpoint: Checkpoint, tensors: Mapping[str, str]) -> Tokens:
    value = checkpoint.config.get(BESIDE)
    if value is None:
        by_name: dict[str, Sequence[int]] = {}
    elif isinstance(value, dict):
        by_name = {name: _read_ids(ids, BESIDE) for name, ids in value.items() if name}
    else:
        by_name = {"": _read_ids(value, BESIDE)}
    if bool(by_name) != bool(tensors):
        raise InvalidArgument(
            "trained tokens go with their tensors",
            field=f"{CONFIG_FILE}: {BESIDE}",
            found=f"{len(by_name)} modules, {len(tensors)} tensors",
        )
    return Tokens(by_name)


def _read_ids(value: object, key: str) -> Sequence[int]:
    ids = value if isinstance(value, list) else [value]
    checked = [whole_number(item, key, least=0, most=_MOST) for item in ids]
    if not checked or len(set(checked)) != len(checked):
        raise InvalidArgument(
            "token ids", field=f"{CONFIG_FILE}: {key}", wanted="one at least, none twice"
        )
    return checked


def _split(checkpoint: Checkpoint, *, beside: bool) -> tuple[Checkpoint, Mapping[str, str]]:
    """The checkpoint without trained tokens and their key; the tokens' tensors by module."""
    found: dict[str, str] = {}
    rest = dict(checkpoint.tensors)
    for tensor in checkpoint.tensors:
        match = _TENSOR.fullmatch(tensor.removeprefix(PREFIX))
        if match is None or bool(match["beside"]) != beside or match["module"] in found:
            continue
        found[match["module"]] = tensor
        del rest[tensor]
    config = {key: value for key, value in checkpoint.config.items() if key != BESIDE}
    return replace(checkpoint, tensors=rest, config=config if beside else checkpoint.config), found


def _edits(
    checkpoint: Checkpoint,
    tensors: Mapping[str, str],
    own: Mapping[str, Sequence[int]],
    tied: Mapping[str, Sequence[int]],
    modules: Mapping[str, ModuleShape],
    parameter: BaseParameter | None,
) -> Mapping[str, ModuleEdit]:
    """own: token ids of modules with tensors; tied: of heads that get the embedding's rows."""
    if own.keys() != tensors.keys() - tied.keys():
        raise FailedPrecondition(
            "modules with trained tokens are those of the config, and of the base",
            field=f"{CONFIG_FILE}: {_ALONE} or {BESIDE}",
            found=", ".join(sorted(tensors)),
            wanted=", ".join(sorted(own)) or "the embedding",
        )
    edits = {
        module: _edit(checkpoint, _Trained(tensors[module], ids), module, modules, parameter)
        for module, ids in own.items()
    }
    rows = {name: edit.token_rows for name, edit in edits.items()}
    for head, ids in tied.items():
        source = next(module for module in own if head in tied_modules(module, modules))
        edits[head] = _edit(
            checkpoint, _Trained(tensors.get(head, tensors[source]), ids), head, modules, parameter
        )
        head_rows, source_rows = edits[head].token_rows, rows[source]
        assert head_rows is not None
        assert source_rows is not None
        if not torch.equal(head_rows, source_rows):
            raise InvalidArgument(
                "rows of a tied head are the embedding's",
                field=f"{WEIGHTS_FILE}: {tensors[head]}",
                wanted=tensors[source],
            )
    return edits


def _edit(
    checkpoint: Checkpoint,
    trained: _Trained,
    module: str,
    modules: Mapping[str, ModuleShape],
    parameter: BaseParameter | None,
) -> ModuleEdit:
    shape, field = modules[module], f"{WEIGHTS_FILE}: {trained.tensor}"
    weight = None if parameter is None else parameter(f"{module}.weight")
    has_bias = parameter is not None and parameter(f"{module}.bias") is not None
    embedding = shape.kind is ModuleKind.EMBEDDING
    if weight is None or has_bias or not (embedding or shape.kind is ModuleKind.LINEAR):
        raise FailedPrecondition(
            "trained tokens are rows of an embedding, or of a head without a bias",
            field=field,
            found=module,
        )
    rows, hidden = weight.shape
    _check_rows(checkpoint, trained, hidden)
    if max(trained.ids) >= rows:
        raise FailedPrecondition(
            "the base has no such token", field=field, found=max(trained.ids), wanted=f"< {rows}"
        )
    order = sorted(range(len(trained.ids)), key=trained.ids.__getitem__)
    loaded = checkpoint.load([trained.tensor])[trained.tensor]
    return ModuleEdit(
        token_ids=torch.tensor(sorted(trained.ids)), token_rows=loaded[order].to(weight.dtype)
    )


def _check_rows(checkpoint: Checkpoint, trained: _Trained, hidden: int | None) -> None:
    shape = checkpoint.tensors[trained.tensor].shape
    if len(shape) != 2 or shape[0] != len(trained.ids) or hidden not in (None, shape[1]):
        raise FailedPrecondition(
            "the tensor's shape does not fit",
            field=f"{WEIGHTS_FILE}: {trained.tensor}",
            found=list(shape),
            wanted=f"[{len(trained.ids)}, {hidden or 'any'}]",
        )


FAMILY = Alone()
