"""LoRA and what peft grew on it: y += scale · (B (A x) + b), and with DoRA all rows rescaled.

Papers: Hu et al. 2021 (arXiv:2106.09685), scale = alpha / r; Kalajdzievski 2023
(arXiv:2312.03732), scale = alpha / √r; Liu et al. 2024, DoRA (arXiv:2402.09353), see `dora`;
Meng et al. 2024, PiSSA (arXiv:2404.02948), and Büyükakyüz 2024, OLoRA (arXiv:2406.01775), see
`initial`. Right is what peft 0.21.2 computes after `PeftModel.from_pretrained` (`tuners/lora`).
A is [r, in] and B [out, r] for Linear and for Conv1D alike, so `fan_in_fan_out` changes only how
peft merges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.dora import rescaled
from manylora.adapters_store.lowering.initial import Init, minus_initial, read_init
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.ranks import ByModule, read_alphas, read_ranks
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition

A, B, B_BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"

OFF: Mapping[str, Sequence[object]] = {
    "use_qalora": (False, None),
    "ensure_weight_tying": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "megatron_config": (None, {}),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None,),
}
HARMLESS = (
    "lora_dropout",
    "fan_in_fan_out",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",  # these four are read only with their own init_lora_weights
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
KEYS = KnownKeys(
    understood=(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "use_dora",
        "lora_bias",
        "bias",
        *TARGET_KEYS,
    ),
    harmless=(*HARMLESS, "merge_weights"),  # the latter in peft 0.1
    off=OFF,
)


@dataclass(slots=True, frozen=True)
class Lora:
    ranks: ByModule[int]
    alphas: ByModule[float]
    rank_stabilised: bool
    init: Init
    dora: bool
    output_bias: bool
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        rank = self.ranks.of(module)
        shapes: dict[str, Shape] = {A: (rank, sizes.inputs), B: (sizes.outputs, rank)}
        if self.output_bias:
            shapes[B_BIAS] = (sizes.outputs,)
        if self.dora:
            shapes[MAGNITUDE] = (sizes.outputs,)
        return shapes

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        rank = self.ranks.of(module)
        return rank if self.init is Init.PLAIN else 2 * rank

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        rank = self.ranks.of(place.name)
        scale = self.alphas.of(place.name) / (math.sqrt(rank) if self.rank_stabilised else rank)
        edit = ModuleEdit(a=place.tensors[A], b=place.tensors[B], scale=scale)
        if self.init is not Init.PLAIN:
            edit = minus_initial(edit, self.init, place)
        if self.output_bias:
            edit.bias = (scale * place.double(B_BIAS)).float()
        if self.dora:
            edit = rescaled(edit, place, place.double(MAGNITUDE))
        return edit


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> Lora:  # noqa: ARG001
    matcher = Matcher()
    dora, output_bias = reader.boolean("use_dora"), reader.boolean("lora_bias")
    if dora and output_bias:
        raise FailedPrecondition(
            "peft has no DoRA with this option", field=reader.field("lora_bias"), wanted="false"
        )
    return Lora(
        ranks=read_ranks(reader, matcher, max_rank),
        alphas=read_alphas(reader, matcher, "lora_alpha"),
        rank_stabilised=reader.boolean("use_rslora"),
        init=read_init(reader),
        dora=dora,
        output_bias=output_bias,
        targets=read_targets(reader, matcher),
    )


FAMILY = Family(KEYS, Names((A, B, B_BIAS, MAGNITUDE)), _read, learned_biases="lora_only")
