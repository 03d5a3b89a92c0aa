"""DeLoRA: low-rank with every rank's strength held at λ / r.

Bini et al. 2025 (arXiv:2503.18225). peft (`tuners/delora`): y += B D A (n ∘ x), with n the column
norms of the base's weight as they were in training (in the file), D diagonal with
λ / (r ‖Aᵢ‖ ‖Bᵢ‖), and each norm at least 1e-4.
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
from manylora.adapters_store.lowering.ranks import ByModule, read_ranks
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names

_A, _B, _LAMBDA, _NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_KEYS = KnownKeys(
    understood=("r", "rank_pattern", "bias", *TARGET_KEYS, "modules_to_save"),
    harmless=("delora_lambda", "lambda_pattern", "module_dropout", "init_weights"),
    off={},
)
_LEAST_NORM = 1e-4


@dataclass(slots=True, frozen=True)
class _DeLora:
    ranks: ByModule[int]
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        rank = self.ranks.of(module)
        return {
            _A: (rank, sizes.inputs),
            _B: (sizes.outputs, rank),
            _LAMBDA: (1,),
            _NORM: (sizes.inputs,),
        }

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.ranks.of(module)

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        a, b = place.double(_A), place.double(_B)
        norms_a = torch.linalg.vector_norm(a, dim=1).clamp(min=_LEAST_NORM)
        norms_b = torch.linalg.vector_norm(b, dim=0).clamp(min=_LEAST_NORM)
        scale = float(place.double(_LAMBDA)) / place.rank
        return balanced(a / norms_a[:, None] * place.double(_NORM), b / norms_b, scale)


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _DeLora:  # noqa: ARG001
    matcher = Matcher()
    return _DeLora(read_ranks(reader, matcher, max_rank), read_targets(reader, matcher))


FAMILY = Family(
    _KEYS,
    Names((_A, _B, _LAMBDA, _NORM)),
    _read,
    learned_biases="delora_only",
    kinds=(ModuleKind.LINEAR,),
)
