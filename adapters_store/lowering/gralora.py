"""GraLoRA: the weight in k by k blocks, each with a low-rank update of its own.

Jung et al. 2025 (arXiv:2505.20355). peft (`tuners/gralora`): block column n projects its inputs to
r numbers, of which each block row j takes its r / k; scale = alpha / (r + hybrid_r), and with
`hybrid_r` a plain low-rank pair is added. All in all of rank k r + hybrid_r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import ANY_LINEAR, Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import InvalidArgument

_A, _B = "gralora_A", "gralora_B"
_WHOLE_A, _WHOLE_B = "gralora_A_general.weight", "gralora_B_general.weight"
_KEYS = KnownKeys(
    understood=(
        "r",
        "hybrid_r",
        "alpha",
        "gralora_k",
        "bias",
        *(key for key in TARGET_KEYS if key != "exclude_modules"),
        "modules_to_save",
    ),
    harmless=("gralora_dropout", "fan_in_fan_out", "init_weights"),
    off={},
)


@dataclass(slots=True, frozen=True)
class _GraLora:
    size: int
    blocks: int
    hybrid: int
    alpha: float
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        shapes: dict[str, Shape] = {
            _A: (self.blocks, self._part(sizes.inputs), self.size),
            _B: (self.blocks, self.size, self._part(sizes.outputs)),
        }
        if self.hybrid:
            shapes[_WHOLE_A] = (self.hybrid, sizes.inputs)
            shapes[_WHOLE_B] = (sizes.outputs, self.hybrid)
        return shapes

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.blocks * self.size + self.hybrid

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        k, part = self.blocks, self.size // self.blocks
        projections = place.double(_A).transpose(1, 2)  # [n, r, in / k]
        a = torch.zeros(k, self.size, k, projections.shape[2], dtype=torch.float64)
        for n in range(k):
            a[n, :, n] = projections[n]
        a = a.flatten(2).flatten(0, 1)
        blocks = place.double(_B)
        blocks = blocks.view(k, k, part, blocks.shape[2])  # [j, n, part, out / k]
        b = torch.zeros(k, blocks.shape[-1], k, k, part, dtype=a.dtype)  # [j, out / k, n, j, part]
        for j in range(k):
            b[j, :, :, j] = blocks[j].permute(2, 0, 1)
        b = b.reshape(place.shape.out_size, k * self.size)
        if self.hybrid:
            a = torch.cat([a, place.double(_WHOLE_A)])
            b = torch.cat([b, place.double(_WHOLE_B)], dim=1)
        return balanced(a, b, self.alpha / (self.size + self.hybrid))

    def _part(self, size: int | None) -> int | None:
        return None if size is None else size // self.blocks


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _GraLora:  # noqa: ARG001
    size = reader.whole_number("r", least=1, most=max_rank)
    blocks = reader.whole_number("gralora_k", least=1, most=size)
    if size % blocks:
        raise InvalidArgument(
            "gralora_k does not divide r", field=reader.field("gralora_k"), found=blocks
        )
    return _GraLora(
        size=size,
        blocks=blocks,
        hybrid=reader.whole_number("hybrid_r", least=0, most=max_rank),
        alpha=reader.number("alpha"),
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(_KEYS, Names((_A, _B, _WHOLE_A, _WHOLE_B)), _read, "gralora_only", ANY_LINEAR)
