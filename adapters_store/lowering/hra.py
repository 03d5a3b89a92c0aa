"""HRA: a chain of r Householder reflections before the weight, W' = W H.

Yuan et al. 2024 (arXiv:2405.17484). peft (`tuners/hra`): H = Π (I - 2 uᵢ uᵢᵀ) over the columns of
`hra_u`, each scaled to length 1; with `apply_GS` they are made orthogonal first. W (H - I) has
rank r: A holds the uᵢ as rows, and column i of B is -2 W (I - 2 u₁ u₁ᵀ)…(I - 2 uᵢ₋₁ uᵢ₋₁ᵀ) uᵢ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition

_U = "hra_u"
_KEYS = KnownKeys(
    understood=("r", "apply_GS", "bias", *TARGET_KEYS, "modules_to_save"),
    harmless=("init_weights",),
    off={},
)


@dataclass(slots=True, frozen=True)
class _Hra:
    size: int
    orthogonal: bool
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        return {_U: (sizes.inputs, self.size)}

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.size

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        u = place.double(_U)
        u = _orthogonal(u) if self.orthogonal else u / torch.linalg.vector_norm(u, dim=0)
        if not u.isfinite().all():
            raise FailedPrecondition(
                "peft divides by the length of a vector of zeros",
                field=f"{WEIGHTS_FILE}: {place.name}.{_U}",
            )
        b = torch.cat([weight @ u for _, weight in place.row_blocks()])
        for i in range(self.size):
            if not self.orthogonal:
                b[:, i] += b[:, :i] @ (u[:, :i].T @ u[:, i])
            b[:, i] *= -2
        return balanced(u.T, b)


def _orthogonal(u: torch.Tensor) -> torch.Tensor:
    """The columns after Gram-Schmidt, in peft's order of subtraction."""
    columns: list[torch.Tensor] = []
    for column in u.T:
        rest = column
        for other in columns:
            rest = rest - (other @ rest) * other
        columns.append(rest / torch.linalg.vector_norm(rest))
    return torch.stack(columns, dim=1)


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _Hra:  # noqa: ARG001
    return _Hra(
        size=reader.whole_number("r", least=1, most=max_rank),
        orthogonal=reader.boolean("apply_GS"),
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(_KEYS, Names((_U,)), _read, learned_biases="hra_only", kinds=(ModuleKind.LINEAR,))
