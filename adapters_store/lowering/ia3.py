"""(IA)³: one learned vector a module, of its outputs, or of its inputs in feed-forward modules.

Liu et al. 2022 (arXiv:2205.05638). peft (`tuners/ia3`): y = l ∘ (W x + b), and y = W (l ∘ x) + b
for `feedforward_modules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.method import ANY_LINEAR, Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import InvalidArgument

_VECTOR = "ia3_l"
_KEYS = KnownKeys(
    understood=("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"),
    harmless=("fan_in_fan_out", "init_ia3_weights"),
    off={},
)


@dataclass(slots=True, frozen=True)
class _Ia3:
    feedforward: str | frozenset[str]
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        scales_inputs = self._scales_inputs(module)
        return {_VECTOR: (1, sizes.inputs) if scales_inputs else (sizes.outputs, 1)}

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return 0

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        vector = place.tensors[_VECTOR].flatten()
        if self._scales_inputs(place.name):
            return ModuleEdit(in_scale=vector)
        return ModuleEdit(out_scale=vector)

    def _scales_inputs(self, module: str) -> bool:
        """peft's own rule: an end of the name, not only of its last words."""
        if isinstance(self.feedforward, str):
            return self.targets.matcher.fullmatch(self.feedforward, module, "feedforward_modules")
        return module.endswith(tuple(self.feedforward))


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _Ia3:  # noqa: ARG001
    value = reader.config.get("feedforward_modules")
    if value is None:
        raise InvalidArgument(
            "no feed-forward modules",
            field=reader.field("feedforward_modules"),
            wanted="the list that peft saves after training, or a regular expression",
        )
    feedforward = (
        value if isinstance(value, str) else frozenset(reader.texts("feedforward_modules"))
    )
    return _Ia3(feedforward, read_targets(reader, Matcher()))


FAMILY = Family(_KEYS, Names((_VECTOR,)), _read, kinds=ANY_LINEAR)
