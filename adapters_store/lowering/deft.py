"""DEFT and PaRa: a subspace of the outputs is taken out of the weight, and another put in.

peft (`tuners/deft`): W' = W - Q Rᵗᵀ W + scale · Q R, with Q = P and Rᵗ = relu(P), or both the
orthonormal factor of P's QR decomposition; PaRa (`para`) puts nothing in. The change is
Q (scale · R - Rᵗᵀ W), of rank r; scale = alpha / r, or 1 without an alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition

_P, _R = "deft_P", "deft_R"
_KEYS = KnownKeys(
    understood=(
        "r",
        "alpha",
        "decomposition_method",
        "para",
        "bias",
        *TARGET_KEYS,
        "modules_to_save",
    ),
    harmless=("init_scale", "fan_in_fan_out", "deft_dropout", "init_weights"),
    off={},
)


@dataclass(slots=True, frozen=True)
class _Deft:
    size: int
    alpha: float
    orthogonal: bool
    removes_only: bool
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        rank = self.size
        outputs = sizes.outputs or found.get(_P, (0,))[0]
        if outputs:
            rank = min(rank, outputs)
        shapes: dict[str, Shape] = {_P: (sizes.outputs, rank)}
        return shapes if self.removes_only else {**shapes, _R: (rank, sizes.inputs)}

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return shapes[_P][1]

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        p = place.tensors[_P].float()
        q, right = (torch.linalg.qr(p)[0],) * 2 if self.orthogonal else (p, p.relu())
        a = torch.zeros(place.rank, place.shape.in_size, dtype=torch.float64)
        for rows, weight in place.row_blocks():
            a -= right[rows].double().T @ weight
        if not self.removes_only:
            a += (self.alpha / place.rank if self.alpha else 1.0) * place.double(_R)
        return balanced(a, q.double())


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _Deft:  # noqa: ARG001
    method = reader.config.get("decomposition_method")
    if method not in ("relu", "qr"):
        raise FailedPrecondition(
            "unknown decomposition",
            field=reader.field("decomposition_method"),
            found=ascii(method),
            wanted="'relu' or 'qr'",
        )
    return _Deft(
        size=reader.whole_number("r", least=1, most=max_rank),
        alpha=0.0 if reader.config.get("alpha") is None else reader.number("alpha"),
        orthogonal=method == "qr",
        removes_only=reader.boolean("para"),
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(_KEYS, Names((_P, _R)), _read, learned_biases="deft_only")
