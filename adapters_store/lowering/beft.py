"""BEFT: one learned bias a module, y += bias (arXiv:2509.15974; peft's `tuners/beft`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names

_BIAS = "beft_bias"
_KEYS = KnownKeys(
    understood=("target_modules", "modules_to_save"),
    harmless=("init_weights",),
    off={},
)


@dataclass(slots=True, frozen=True)
class _Beft:
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        return {_BIAS: (1, sizes.outputs)}

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return 0

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: ModuleEdit(bias=place.tensors[_BIAS].flatten()) for place in places}


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _Beft:  # noqa: ARG001
    return _Beft(read_targets(reader, Matcher()))


FAMILY = Family(_KEYS, Names((_BIAS,)), _read, kinds=(ModuleKind.LINEAR, ModuleKind.QUANTISED))
