"""MiSS: the inputs are summed in r classes, and one small matrix spreads the sums.

Kang and Yin 2024 (arXiv:2409.15371). peft (`tuners/miss`): y += Mᵀ s, where sₖ is the sum of
the inputs i with i mod r = k, so A holds zeros and ones. With `init_weights` "mini" M's columns
repeat; "bat" multiplies the weight by a matrix in blocks and has no small exact form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition

_BLOCK = "miss_block"
_KEYS = KnownKeys(
    understood=("r", "mini_r", "init_weights", "bias", *TARGET_KEYS, "modules_to_save"),
    harmless=("miss_dropout",),
    off={},
)


@dataclass(slots=True, frozen=True)
class _Miss:
    size: int
    columns: int | None
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        return {_BLOCK: (self.size, self.columns or sizes.outputs)}

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.size

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        block = place.double(_BLOCK)
        times = place.shape.out_size // block.shape[1]
        sums = torch.eye(self.size).repeat(1, -(-place.shape.in_size // self.size))
        return balanced(sums[:, : place.shape.in_size], block.repeat(1, times).T)


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _Miss:  # noqa: ARG001
    init = reader.config.get("init_weights", True)
    if init not in (True, False, None, "mini"):
        raise FailedPrecondition(
            "this form of MiSS has no small exact form",
            field=reader.field("init_weights"),
            found=ascii(init),
            wanted="true, false or 'mini'",
        )
    mini = reader.whole_number("mini_r", least=1, most=1 << 30) if init == "mini" else None
    return _Miss(
        size=reader.whole_number("r", least=1, most=max_rank),
        columns=mini,
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(
    _KEYS,
    Names((_BLOCK,)),
    _read,
    learned_biases="miss_only",
    kinds=(ModuleKind.LINEAR, ModuleKind.QUANTISED),
)
