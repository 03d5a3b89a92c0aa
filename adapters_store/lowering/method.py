"""What all PEFT methods that edit modules share: tensors in, edits out, nothing left over.

A family (one file beside this one) says which keys and tensors it knows, which shapes they have,
and what one module's tensors mean. Here it is seen to that every tensor of the file is used,
every targeted module of the base has its tensors, and all shapes fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering.base_copies import BaseParameter
from manylora.adapters_store.lowering.biases import add_biases, check_biases, read_trained
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.saved_modules import (
    SavedModules,
    read_saved,
    saved_edits,
)
from manylora.adapters_store.lowering.targets import Targets
from manylora.adapters_store.lowering.tensors import PREFIX, FileParts, Names, read_parts
from manylora.errors import FailedPrecondition, InvalidArgument

Shape: TypeAlias = tuple[int | None, ...]
"""A tensor's shape as wanted; None stands for any size."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

ANY_LINEAR = (ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.QUANTISED)
"""For methods that leave the base's weight alone, also where peft computes with it quantised."""

_ANY_RANK = 1 << 30  # the limit was checked when the adapter was published


class Method(Protocol):
    """One adapter's method, its config read."""

    @property
    def targets(self) -> Targets: ...

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:
        """The parts that the module must have, exactly, and their shapes. found: what it has."""

    def rank(self, module: str, shapes: Shapes) -> int:
        """Rank of the module's edit. shapes: of its parts, checked."""

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        """One edit a place, by the module's name."""


@dataclass(slots=True, frozen=True)
class Family:
    """One PEFT method.

    read: the config, and the shapes of the shared tensors in the file, to a method; the last
    argument bounds the ranks that the config names. learned_biases: the word that stands for
    'biases of the adapted modules' in its config's `bias`, "" where it has no such option.
    kinds: of modules that peft has it for.
    """

    keys: KnownKeys
    names: Names
    read: Callable[[ConfigReader, Shapes, int], Method]
    learned_biases: str = ""
    kinds: Sequence[ModuleKind] = (ModuleKind.LINEAR, ModuleKind.CONV1D)

    def check(self, checkpoint: Checkpoint, limits: Limits) -> int:
        """Checks all that can be checked without a base; returns the largest rank."""
        method, _, parts = self._read(checkpoint, limits.max_rank)
        for module, tensors in parts.modules.items():
            _check_parts(checkpoint, method, module, tensors, Sizes())
        tensors_of = parts.modules or {"any module": {}}
        ranks = {
            module: method.rank(module, _shapes(checkpoint, tensors))
            for module, tensors in tensors_of.items()
        }
        module = max(ranks, key=ranks.__getitem__)
        if ranks[module] > limits.max_rank:
            raise InvalidArgument(
                f"rank of the edit of {module}",
                field=f"{CONFIG_FILE}: r",
                found=ranks[module],
                wanted=f"at most {limits.max_rank}",
            )
        return ranks[module]

    def lower(
        self,
        checkpoint: Checkpoint,
        modules: Mapping[str, ModuleShape],
        parameter: BaseParameter | None,
    ) -> LoweredAdapter:
        """One edit for each targeted module, and for each that was saved whole."""
        method, saved, parts = self._read(checkpoint, _ANY_RANK)
        if not self.names.parts:
            parts = replace(parts, modules=_targeted(method, saved, modules))
        for module, tensors in parts.modules.items():
            self._check_fit(checkpoint, method, modules, module, tensors)
        _check_complete(method, saved, parts, modules)
        edits, rest = saved_edits(checkpoint, saved, parts.copies, modules, parameter)
        parts = replace(parts, copies=rest)
        trained = read_trained(ConfigReader(checkpoint.config), self.learned_biases)
        check_biases(checkpoint, parts, trained, modules, parameter)
        places = _places(checkpoint, parts, modules, parameter, method)
        edits = {**edits, **method.edits(places)}
        add_biases(checkpoint, parts, trained, edits, modules, parameter)
        return LoweredAdapter(edits=edits)

    def _read(
        self, checkpoint: Checkpoint, max_rank: int
    ) -> tuple[Method, SavedModules, FileParts]:
        reader = ConfigReader(checkpoint.config)
        reader.check_keys(self.keys)
        read_trained(reader, self.learned_biases)
        parts = read_parts(checkpoint, self.names)
        method = self.read(reader, _shapes(checkpoint, parts.shared), max_rank)
        saved = read_saved(reader)
        for module, tensors in parts.modules.items():
            if saved.excludes(module) or not method.targets.match(module):
                raise InvalidArgument(
                    "the config does not target this module, so peft would leave the tensor out",
                    field=f"{WEIGHTS_FILE}: {next(iter(tensors.values()))}",
                    wanted=f"a tensor of a module in {CONFIG_FILE}: target_modules",
                )
        return method, saved, parts

    def _check_fit(
        self,
        checkpoint: Checkpoint,
        method: Method,
        modules: Mapping[str, ModuleShape],
        module: str,
        tensors: Mapping[str, str],
    ) -> None:
        shape = modules.get(module)
        field = f"{WEIGHTS_FILE}: {next(iter(tensors.values()), module)}"
        if shape is None or not method.targets.match(module, shape.kind):
            raise FailedPrecondition(
                "the base has no such module to adapt",
                field=field,
                found=module,
                wanted=f"a module of the base, as {next(iter(modules), 'none')}",
            )
        if shape.kind not in self.kinds:
            raise FailedPrecondition(
                "peft does not have this method for modules of this kind, or it is not served",
                field=field,
                found=shape.kind.value,
                wanted=" or ".join(kind.value for kind in self.kinds),
            )
        _check_parts(checkpoint, method, module, tensors, Sizes(shape.in_size, shape.out_size))


def _targeted(
    method: Method, saved: SavedModules, modules: Mapping[str, ModuleShape]
) -> Mapping[str, Mapping[str, str]]:
    """Of a method whose modules have no tensors of their own: each of the config's, with none."""
    found: dict[str, Mapping[str, str]] = {
        module: {}
        for module, shape in modules.items()
        if method.targets.match(module, shape.kind) and not saved.excludes(module)
    }
    if not found:
        raise FailedPrecondition(
            "the base has no module that the config targets",
            field=f"{CONFIG_FILE}: target_modules",
            wanted=f"modules of the base, as {next(iter(modules), 'none')}",
        )
    return found


def _shapes(checkpoint: Checkpoint, tensors: Mapping[str, str]) -> Shapes:
    return {part: checkpoint.tensors[tensor].shape for part, tensor in tensors.items()}


def _check_parts(
    checkpoint: Checkpoint,
    method: Method,
    module: str,
    tensors: Mapping[str, str],
    sizes: Sizes,
) -> None:
    """The module has the parts that the config calls for, no others, in the right shapes."""
    wanted = method.shapes(module, sizes, _shapes(checkpoint, tensors))
    some = next(iter(tensors.values()), module)
    for part, tensor in tensors.items():
        if part not in wanted:
            raise InvalidArgument(
                "the tensor does not go with the config",
                field=f"{WEIGHTS_FILE}: {tensor}",
                wanted=" and ".join(wanted),
            )
        check_shape(checkpoint.tensors[tensor].shape, wanted[part], tensor)
    for part in wanted:
        if part not in tensors:
            raise InvalidArgument(
                "a module's tensors go together",
                field=f"{WEIGHTS_FILE}: {some}",
                wanted=f"{part} of {module}",
            )


def _check_complete(
    method: Method, saved: SavedModules, parts: FileParts, modules: Mapping[str, ModuleShape]
) -> None:
    """Every module of the base that the config targets has its tensors."""
    for module, shape in modules.items():
        if module in parts.modules or saved.excludes(module):
            continue
        if method.targets.match(module, shape.kind):
            wanted = method.shapes(module, Sizes(shape.in_size, shape.out_size), {})
            part = next(iter(wanted), "")
            raise FailedPrecondition(
                "the config targets a module that has no tensors in the file",
                field=f"{WEIGHTS_FILE}: {PREFIX}{module}.{part}",
                found="nothing",
                wanted=_text(wanted.get(part, ())),
            )


def _places(
    checkpoint: Checkpoint,
    parts: FileParts,
    modules: Mapping[str, ModuleShape],
    parameter: BaseParameter | None,
    method: Method,
) -> list[Place]:
    """In the order of the base's tree."""
    names = [t for tensors in parts.modules.values() for t in tensors.values()]
    loaded = checkpoint.load([*names, *parts.shared.values()])
    shared = {part: loaded[tensor] for part, tensor in parts.shared.items()}
    return [
        Place(
            name=module,
            shape=modules[module],
            tensors={part: loaded[tensor] for part, tensor in parts.modules[module].items()},
            shared=shared,
            parameter=parameter,
            rank=method.rank(module, _shapes(checkpoint, parts.modules[module])),
        )
        for module in modules
        if module in parts.modules
    ]


def check_shape(found: tuple[int, ...], wanted: Shape, tensor: str) -> None:
    """Raises FailedPrecondition naming the tensor, both shapes."""
    if len(found) != len(wanted) or any(
        w is not None and f != w for f, w in zip(found, wanted, strict=True)
    ):
        raise FailedPrecondition(
            "the tensor's shape does not fit",
            field=f"{WEIGHTS_FILE}: {tensor}",
            found=list(found),
            wanted=_text(wanted),
        )


def _text(shape: Shape) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
