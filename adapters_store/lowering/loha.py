"""LoHa: the element-wise product of two low-rank products, itself of rank r².

Hyeon-Woo et al. 2022, FedPara (arXiv:2108.06098). peft (`tuners/loha`): y += scale ·
((w1_a w1_b) ∘ (w2_a w2_b)) x with scale = alpha / r. Row by row of the outer factors and column by
column of the inner ones, the product of all pairs of ranks (Khatri-Rao) gives A and B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.ranks import ByModule, read_alphas, read_ranks
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KEYS = KnownKeys(
    understood=("r", "alpha", "rank_pattern", "alpha_pattern", *TARGET_KEYS, "modules_to_save"),
    harmless=("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
    off={},
)


@dataclass(slots=True, frozen=True)
class _LoHa:
    ranks: ByModule[int]
    alphas: ByModule[float]
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        rank = self.ranks.of(module)
        outer, inner = (sizes.outputs, rank), (rank, sizes.inputs)
        return dict(zip(_PARTS, (outer, inner, outer, inner), strict=True))

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.ranks.of(module) ** 2

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        outer1, inner1, outer2, inner2 = (place.double(part) for part in _PARTS)
        b = (outer1[:, :, None] * outer2[:, None, :]).flatten(1)
        a = (inner1[:, None, :] * inner2[None, :, :]).flatten(0, 1)
        return balanced(a, b, self.alphas.of(place.name) / self.ranks.of(place.name))


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _LoHa:  # noqa: ARG001
    matcher = Matcher()
    return _LoHa(
        ranks=read_ranks(reader, matcher, max_rank),
        alphas=read_alphas(reader, matcher, "alpha"),
        targets=read_targets(reader, matcher),
    )


FAMILY = Family(_KEYS, Names(_PARTS), _read, kinds=(ModuleKind.LINEAR,))
