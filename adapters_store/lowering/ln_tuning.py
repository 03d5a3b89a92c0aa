"""LN tuning: norms' weights and biases of the adapter's own (Zhao et al. 2023, arXiv:2312.11420;
peft's `tuners/ln_tuning`, which puts a trained copy in the place of each targeted norm)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"
_KEYS = KnownKeys(
    understood=("target_modules", "exclude_modules", "modules_to_save"), harmless=(), off={}
)


@dataclass(slots=True, frozen=True)
class _LnTuning:
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        parts = (_WEIGHT, _BIAS) if _BIAS in found else (_WEIGHT,)
        return dict.fromkeys(parts, (sizes.outputs,))

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return 0

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: _edit(place) for place in places}


def _edit(place: Place) -> ModuleEdit:
    weight, bias = place.own("weight"), place.own("bias")
    if weight is None or (bias is None) != (_BIAS not in place.tensors):
        raise FailedPrecondition(
            "the base's norm has other parameters",
            field=f"{WEIGHTS_FILE}: {place.name}",
            found=list(place.tensors),
            wanted="a weight and no bias" if bias is None else "a weight and a bias",
        )
    own_bias = None if bias is None else place.tensors[_BIAS].to(bias.dtype)
    return ModuleEdit(weight=place.tensors[_WEIGHT].to(weight.dtype), own_bias=own_bias)


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _LnTuning:  # noqa: ARG001
    return _LnTuning(read_targets(reader, Matcher()))


FAMILY = Family(_KEYS, Names((_WEIGHT, _BIAS)), _read, kinds=(ModuleKind.NORM,))
