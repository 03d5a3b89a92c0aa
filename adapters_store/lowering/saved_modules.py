"""Modules that were trained whole beside the adapter (`modules_to_save`): the base's are left out.

peft (`utils/other.ModulesToSaveWrapper`) puts a copy in the place of every module whose name ends
with one of the config's, whatever the method, and loads the copy from the file. A tied head keeps
the base's weight where only the embedding is saved, and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.lowering.base_copies import BaseParameter
from manylora.adapters_store.lowering.config_reader import ConfigReader
from manylora.adapters_store.lowering.tensors import PREFIX, Copy
from manylora.errors import FailedPrecondition

KEY = "modules_to_save"
_PLAIN = re.compile(r"[\w.]+")
_LEAVES = ("weight", "bias")


@dataclass(slots=True, frozen=True)
class SavedModules:
    """The config's `modules_to_save`."""

    names: tuple[str, ...]

    def takes(self, module: str) -> bool:
        """Whether the module, or one that it is a part of, is saved: its name ends so, as peft
        wraps it, in the middle of a word, too."""
        ends = [i for i, letter in enumerate(module) if letter == "."] + [len(module)]
        return any(module[:end].endswith(self.names) for end in ends)

    def excludes(self, module: str) -> bool:
        """Whether the method targets nothing there, by whole words."""
        return any(f".{name}." in f".{module}." for name in self.names)


def read_saved(reader: ConfigReader) -> SavedModules:
    """Raises FailedPrecondition for a name that peft would take for a regular expression."""
    names = reader.texts(KEY)
    for name in names:
        if not _PLAIN.fullmatch(name):
            raise FailedPrecondition(
                "not a module's name",
                field=f"{CONFIG_FILE}: {KEY}",
                found=ascii(name),
                wanted="letters, digits, _ and .",
            )
    return SavedModules(names)


def saved_edits(
    checkpoint: Checkpoint,
    saved: SavedModules,
    copies: Mapping[str, Copy],
    modules: Mapping[str, ModuleShape],
    parameter: BaseParameter | None,
) -> tuple[Mapping[str, ModuleEdit], Mapping[str, Copy]]:
    """The saved modules' edits; and the copies that are no saved module's.

    Raises FailedPrecondition for one that lacks a tensor, or has it in another shape.
    """
    found: dict[str, dict[str, str]] = {}
    rest: dict[str, Copy] = {}
    for name, copy in copies.items():
        module, _, leaf = name.rpartition(".")
        if saved.names and module in modules and saved.takes(module) and not copy.inside:
            found.setdefault(module, {})[leaf] = copy.tensor
        else:
            rest[name] = copy
    for module in modules if saved.names else ():
        if saved.takes(module):
            if modules[module].kind is ModuleKind.QUANTISED:
                raise FailedPrecondition(
                    "a quantised module cannot be replaced whole",
                    field=f"{CONFIG_FILE}: {KEY}",
                    found=module,
                )
            _check(checkpoint, module, found.setdefault(module, {}), parameter)
    edits = {
        module: edit
        for module, tensors in found.items()
        if (edit := _edit(checkpoint, tensors, module, modules[module], parameter)) is not None
    }
    return edits, rest


def _check(
    checkpoint: Checkpoint,
    module: str,
    tensors: Mapping[str, str],
    parameter: BaseParameter | None,
) -> None:
    """The module's tensors are all there are, in the base's shapes."""
    for leaf in _LEAVES:
        base = None if parameter is None else parameter(f"{module}.{leaf}")
        shape = None if base is None else tuple(base.shape)
        tensor = tensors.get(leaf)
        found = None if tensor is None else checkpoint.tensors[tensor].shape
        if shape != found:
            both = shape is not None and found is not None
            raise FailedPrecondition(
                "the tensor's shape does not fit" if both else "a saved module is saved whole",
                field=f"{WEIGHTS_FILE}: {tensor or f'{PREFIX}{module}.{leaf}'}",
                found="nothing" if found is None else list(found),
                wanted="nothing" if shape is None else str(list(shape)),
            )


def _edit(
    checkpoint: Checkpoint,
    tensors: Mapping[str, str],
    module: str,
    shape: ModuleShape,
    parameter: BaseParameter | None,
) -> ModuleEdit | None:
    """None where all is as in the base."""
    assert parameter is not None
    loaded = checkpoint.load(tensors.values())
    own: dict[str, torch.Tensor] = {}
    same = True
    for leaf, tensor in tensors.items():
        base = parameter(f"{module}.{leaf}")
        assert base is not None
        own[leaf] = loaded[tensor].to(base.dtype)
        same = same and torch.equal(own[leaf], base.detach().cpu())
    if same:
        return None
    weight = own["weight"].T if shape.kind is ModuleKind.CONV1D else own["weight"]
    return ModuleEdit(weight=weight.contiguous(), own_bias=own.get("bias"))
