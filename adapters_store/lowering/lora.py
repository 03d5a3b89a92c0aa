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

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.dora import rescaled
from manylora.adapters_store.lowering.initial import Init, minus_initial, read_init
from manylora.adapters_store.lowering.method import ANY_LINEAR, Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.ranks import ByModule, read_alphas, read_ranks
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition

A, B, B_BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"

OFF: Mapping[str, Sequence[object]] = {
    "use_qalora": (False, None),
    "ensure_weight_tying": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "megatron_config": (None, {}),
    "trainable_token_indices": (None,),  # LoRA's own are read by `trained_tokens`
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
        "modules_to_save",
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

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:
        rank = self.ranks.of(module)
        a, b = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in found else (A, B)
        shapes: dict[str, Shape] = {a: (rank, sizes.inputs), b: (sizes.outputs, rank)}
        if self.output_bias:
            shapes[B_BIAS] = (sizes.outputs,)
        if self.dora:
            shapes[MAGNITUDE] = (sizes.outputs,)
        return shapes

    def rank(self, module: str, shapes: Shapes) -> int:
        rank = self.ranks.of(module)
        return rank if self.init is Init.PLAIN or EMBEDDING_A in shapes else 2 * rank

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        rank = self.ranks.of(place.name)
        scale = self.alphas.of(place.name) / (math.sqrt(rank) if self.rank_stabilised else rank)
        on_gather = place.shape.kind is ModuleKind.EMBEDDING
        if on_gather != (EMBEDDING_A in place.tensors):
            raise FailedPrecondition(
                "the tensors are those of another kind of module",
                field=f"{WEIGHTS_FILE}: {place.name}",
                found=", ".join(place.tensors),
                wanted=f"those of a module of kind {place.shape.kind.value}",
            )
        a, b = (EMBEDDING_A, EMBEDDING_B) if on_gather else (A, B)
        edit = ModuleEdit(a=place.tensors[a], b=place.tensors[b], scale=scale)
        if self.init is not Init.PLAIN and not on_gather:
            edit = minus_initial(edit, self.init, place)
        if self.output_bias:
            edit.bias = (scale * place.double(B_BIAS)).float()
        if self.dora:
            edit = rescaled(edit, place, place.double(MAGNITUDE))
        edit.on_gather = on_gather
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


FAMILY = Family(
    KEYS,
    Names((A, B, B_BIAS, MAGNITUDE, EMBEDDING_A, EMBEDDING_B)),
    _read,
    learned_biases="lora_only",
    kinds=(*ANY_LINEAR, ModuleKind.EMBEDDING),
)
