"""AdaLoRA: low-rank in the form of a singular value decomposition, ranks chosen by module.

Zhang et al. 2023 (arXiv:2303.10512). peft (`tuners/adalora`): y += scale · B ((E ∘ A) x) with
scale = alpha / (n + 1e-5), or n / (n + 1e-5) where alpha is not positive; n is `init_r` even where
`rank_pattern` has since left fewer ranks. E [r, 1] is folded into A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.lowering import lora
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import ANY_LINEAR, Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import PREFIX, Names
from manylora.errors import InvalidArgument

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
_KEYS = KnownKeys(
    understood=("init_r", "lora_alpha", "rank_pattern", "bias", *TARGET_KEYS, "modules_to_save"),
    harmless=("r", "init_lora_weights", "total_step", *_SCHEDULE, *lora.HARMLESS),
    off={
        **lora.OFF,
        "use_dora": (False, None),
        "use_rslora": (False, None),
        "lora_bias": (False, None),
        "alpha_pattern": (None, {}),
    },
)


@dataclass(slots=True, frozen=True)
class _AdaLora:
    initial_rank: int
    ranks: Mapping[str, int]
    alpha: float
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        rank = self.ranks.get(module, self.initial_rank)
        return {_A: (rank, sizes.inputs), _B: (sizes.outputs, rank), _E: (rank, 1)}

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.ranks.get(module, self.initial_rank)

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        a, b, e = (place.double(part) for part in (_A, _B, _E))
        # a positive alpha is not divided by the rank here; peft says so too
        alpha = self.alpha if self.alpha > 0 else float(place.rank)
        return balanced(e * a, b, alpha / (self.initial_rank + 1e-5))


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _AdaLora:  # noqa: ARG001
    ranks = {}
    for name, kept in reader.mapping("rank_pattern").items():
        if not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept):
            raise InvalidArgument(
                "the config's value is wrong",
                field=reader.field("rank_pattern"),
                found=ascii(kept),
                wanted="a list of true and false",
            )
        ranks[name.removeprefix(PREFIX).removesuffix(f".{_E}")] = sum(kept)
    return _AdaLora(
        initial_rank=reader.whole_number("init_r", least=1, most=max_rank),
        ranks=ranks,
        alpha=reader.number("lora_alpha"),
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(_KEYS, Names((_A, _B, _E)), _read, "lora_only", ANY_LINEAR)
