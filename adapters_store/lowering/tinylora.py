"""TinyLoRA: y += B R A x with R = Σ v_i P_i (arXiv:2602.04118; peft's `tuners/tinylora`).

A and B, from the base's singular value decomposition, are in the file; P is, too, or is drawn
again from `projection_seed` plus the module's place among the adapted ones. The vectors v are
shared: modules belong to them by their places, in the order of the base's tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition, InvalidArgument

_A, _B, _P, _V = "tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v"
_MAX_SEED = 1 << 62
_MAX_SIZE = 1 << 20
_KEYS = KnownKeys(
    understood=(
        "r",
        "u",
        "weight_tying",
        "projection_seed",
        "save_projection",
        "target_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "modules_to_save",
    ),
    harmless=("tinylora_dropout", "fan_in_fan_out", "init_weights", "init_v_bound"),
    off={},
)


@dataclass(slots=True, frozen=True)
class _TinyLora:
    r: int
    size: int
    tying: float
    seed: int
    saved_projection: bool
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        known = [size for size in (sizes.inputs, sizes.outputs) if size is not None]
        rank = min(self.r, *known) if known else min(self.r, *found.get(_A, (self.r,))[:1])
        shapes: dict[str, Shape] = {_A: (rank, sizes.inputs), _B: (sizes.outputs, rank)}
        if self.saved_projection:
            shapes[_P] = (self.size, rank, rank)
        return shapes

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return shapes[_A][0]

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        groups = max(1, round(len(places) * (1.0 - self.tying)))
        size = max(1, len(places) // groups)
        keys = [f"{_V}.{min(i // size, groups - 1)}" for i in range(len(places))]
        if places and set(keys) != places[0].shared.keys():
            raise FailedPrecondition(
                "the vectors are not those of the base's modules",
                field=f"{WEIGHTS_FILE}: {_V}",
                found=len(places[0].shared),
                wanted=str(len(set(keys))),
            )
        return {
            place.name: self._edit(place, place.shared[key], i)
            for i, (place, key) in enumerate(zip(places, keys, strict=True))
        }

    def _edit(self, place: Place, vector: torch.Tensor, index: int) -> ModuleEdit:
        projections = self._projections(place, index).to(torch.float64)
        mixed = torch.einsum("i,ijk->jk", vector.double(), projections)
        return balanced(mixed @ place.double(_A), place.double(_B))

    def _projections(self, place: Place, index: int) -> torch.Tensor:
        """[size, rank, rank]."""
        if _P in place.tensors:
            return place.tensors[_P]
        generator = torch.Generator().manual_seed(self.seed + index)
        shape = (self.size, place.rank, place.rank)
        return torch.normal(0.0, 1.0 / (place.rank**0.5), size=shape, generator=generator)


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _TinyLora:
    size = reader.whole_number("u", least=1, most=_MAX_SIZE)
    tying = reader.number("weight_tying")
    if not 0 <= tying <= 1 or not shared:
        raise InvalidArgument(
            "not a degree of sharing, or no vectors",
            field=reader.field("weight_tying"),
            found=tying,
            wanted=f"a number from 0 to 1, and {_V}",
        )
    for name, shape in shared.items():
        if shape != (size,):
            raise FailedPrecondition(
                "the tensor's shape does not fit",
                field=f"{WEIGHTS_FILE}: {name}",
                found=list(shape),
                wanted=f"[{size}]",
            )
    return _TinyLora(
        r=reader.whole_number("r", least=1, most=max_rank),
        size=size,
        tying=tying,
        seed=reader.whole_number("projection_seed", least=-_MAX_SEED, most=_MAX_SEED),
        saved_projection=reader.boolean("save_projection"),
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(_KEYS, Names((_A, _B, _P), numbered=(_V,)), _read, learned_biases="tinylora_only")
