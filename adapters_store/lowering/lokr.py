"""LoKr: a Kronecker product of two small matrices, each whole or a low-rank product.

Yeh et al. 2024, LyCORIS (arXiv:2309.14859). peft (`tuners/lokr`): y += scale · (w1 ⊗ w2) x with
scale = alpha / r. Since (p q) ⊗ (s t) = (p ⊗ s)(q ⊗ t), its rank is at most the product of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.ranks import ByModule, read_alphas, read_ranks
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names

_WORDS = ("lokr_w1", "lokr_w2")
_KEYS = KnownKeys(
    understood=(
        "r",
        "alpha",
        "rank_pattern",
        "alpha_pattern",
        "decompose_both",
        "decompose_factor",
        *TARGET_KEYS,
        "modules_to_save",
    ),
    harmless=(
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
        "use_effective_conv2d",
        "init_weights",
    ),
    off={},
)


@dataclass(slots=True, frozen=True)
class _LoKr:
    ranks: ByModule[int]
    alphas: ByModule[float]
    both: bool
    factor: int
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:
        rank = self.ranks.of(module)
        inputs, outputs = _sizes(sizes, found)
        if not inputs or not outputs:
            return dict.fromkeys(_WORDS, (None, None))  # of which one is not there
        in_sizes = _factorisation(inputs, self.factor)
        out_sizes = _factorisation(outputs, self.factor)
        shapes: dict[str, Shape] = {}
        for word, columns, rows in zip(_WORDS, in_sizes, out_sizes, strict=True):
            whole = word == _WORDS[0] and not self.both
            if not whole and rank < max(columns, rows) / 2:
                shapes[f"{word}_a"], shapes[f"{word}_b"] = (rows, rank), (rank, columns)
            else:
                shapes[word] = (rows, columns)
        return shapes

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return _rank(shapes, _WORDS[0]) * _rank(shapes, _WORDS[1])

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        (b1, a1), (b2, a2) = (_pair(place, word) for word in _WORDS)
        a, b = torch.kron(a1, a2), torch.kron(b1, b2)
        return balanced(a, b, self.alphas.of(place.name) / self.ranks.of(place.name))


def _sizes(sizes: Sizes, found: Shapes) -> tuple[int, int]:
    """The module's inputs and outputs, by the tensors where there is no base; 0 if not all are."""
    rows = [found.get(word, found.get(f"{word}_a", (0,)))[0] for word in _WORDS]
    columns = [found.get(word, found.get(f"{word}_b", (0,)))[-1] for word in _WORDS]
    return sizes.inputs or math.prod(columns), sizes.outputs or math.prod(rows)


def _factorisation(size: int, factor: int) -> tuple[int, int]:
    """peft's own: two factors of the size, the smaller first unless the given one divides it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small, large = 1, size
    for candidate in range(2, math.isqrt(size) + 1):
        if candidate > most:
            break
        if size % candidate == 0:
            small, large = candidate, size // candidate
    return small, large


def _rank(shapes: Shapes, word: str) -> int:
    return min(shapes[word]) if word in shapes else shapes[f"{word}_a"][1]


def _pair(place: Place, word: str) -> tuple[torch.Tensor, torch.Tensor]:
    """b, a with b a the factor: its low-rank pair, or itself and an identity."""
    if word not in place.tensors:
        return place.double(f"{word}_a"), place.double(f"{word}_b")
    whole = place.double(word)
    rows, columns = whole.shape
    if rows <= columns:
        return torch.eye(rows, dtype=whole.dtype), whole
    return whole, torch.eye(columns, dtype=whole.dtype)


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _LoKr:  # noqa: ARG001
    matcher = Matcher()
    return _LoKr(
        ranks=read_ranks(reader, matcher, max_rank),
        alphas=read_alphas(reader, matcher, "alpha"),
        both=reader.boolean("decompose_both"),
        factor=reader.whole_number("decompose_factor", least=-1, most=1 << 30),
        targets=read_targets(reader, matcher),
    )


FAMILY = Family(
    _KEYS,
    Names(tuple(f"{word}{side}" for word in _WORDS for side in ("", "_a", "_b"))),
    _read,
    kinds=(ModuleKind.LINEAR,),
)
