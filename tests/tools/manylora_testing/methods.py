"""Every served PEFT method: adapters that peft itself makes and saves, with weights that matter."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn


@dataclass(frozen=True)
class Places:
    """Modules of one architecture: some of attention, some of the MLP, its last; the embedding,
    some norms, and the norm before the head; the head, where it continues text."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    last: str
    embedding: str
    norms: tuple[str, ...]
    last_norm: str
    head: str = "lm_head"

    @property
    def all(self) -> list[str]:
        return [*self.attention, *self.mlp]


_LLAMA = Places(
    ("q_proj", "v_proj", "o_proj"),
    ("up_proj", "down_proj"),
    "down_proj",
    "embed_tokens",
    ("input_layernorm", "post_attention_layernorm"),
    "model.norm",
)
PLACES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Places(
        ("q_proj", "v_proj", "out_proj"),
        ("fc1", "fc2"),
        "fc2",
        "embed_tokens",
        ("self_attn_layer_norm",),
        "decoder.final_layer_norm",
    ),
    "gpt2": Places(
        ("c_attn",), ("c_fc", "mlp.c_proj"), "mlp.c_proj", "wte", ("ln_1", "ln_2"), "ln_f"
    ),
    "roberta": Places(
        ("query", "value"),
        ("intermediate.dense", "output.dense"),
        "output.dense",
        "word_embeddings",
        ("attention.output.LayerNorm", "embeddings.LayerNorm"),
        "layer.1.output.LayerNorm",
        head="",
    ),
}


def _kept_ranks(places: Places) -> dict[str, list[bool]]:
    """AdaLoRA's `rank_pattern`, as its allocator leaves it."""
    module = {
        "q_proj": "model.layers.0.self_attn.q_proj",
        "c_attn": "transformer.h.0.attn.c_attn",
        "query": "roberta.encoder.layer.0.attention.self.query",
    }
    name = module[places.attention[0]]
    if places.last == "fc2":
        name = name.replace("model.", "model.decoder.")
    kept = {f"{name}.lora_E": [True, False, True, True]}
    return {**kept, f"{name.replace('.0.', '.1.', 1)}.lora_E": [False] * 4}


@dataclass(frozen=True)
class Recipe:
    """kind: of peft's config; options: its arguments, some by the architecture's places. conv1d:
    whether peft has it for GPT-2's; text: whether only for what continues text."""

    kind: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    placed: Callable[[Places], Mapping[str, Any]] = lambda places: {"target_modules": places.all}
    conv1d: bool = True
    text: bool = False
    after: Callable[[Any, Places], None] = lambda config, places: None  # noqa: ARG005

    def config(self, arch: str) -> peft.PeftConfig:
        options = {**self.options, **self.placed(PLACES[arch])}
        task = "CAUSAL_LM" if PLACES[arch].head else "SEQ_CLS"
        return self.kind(task_type=task, **options)


def _keep_ranks(config: Any, places: Places) -> None:
    config.rank_pattern = _kept_ranks(places)


def _ia3(places: Places) -> dict[str, Any]:
    return {"target_modules": places.all, "feedforward_modules": list(places.mlp)}


def _ia3_odd(places: Places) -> dict[str, Any]:
    scaled = places.attention[:2]
    return {"target_modules": places.all, "feedforward_modules": list(scaled)}


def _nowhere(places: Places) -> dict[str, Any]:  # noqa: ARG001
    return {}


def _lora_and(saved: Callable[[Places], list[str]]) -> Callable[[Places], dict[str, Any]]:
    """LoRA on some modules, and others saved whole."""
    return lambda places: {"target_modules": [places.last], "modules_to_save": saved(places)}


_TOKENS = list(range(95, 3, -3))  # enough of them that prompts have some
_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}
INVOCATION = [7, 9]
_ADALORA: dict[str, Any] = {"init_r": 4, "target_r": 3, "lora_alpha": 6, "total_step": 10}

METHODS: dict[str, Recipe] = {
    "lora": Recipe(peft.LoraConfig, _LORA),
    "rslora": Recipe(peft.LoraConfig, {**_LORA, "use_rslora": True}),
    "lora-bias-only": Recipe(peft.LoraConfig, {**_LORA, "bias": "lora_only"}),
    "lora-bias-all": Recipe(peft.LoraConfig, {**_LORA, "bias": "all"}),
    "lora_bias": Recipe(peft.LoraConfig, {**_LORA, "lora_bias": True}),
    "dora": Recipe(peft.LoraConfig, {**_LORA, "use_dora": True}),
    "dora-bias": Recipe(peft.LoraConfig, {**_LORA, "use_dora": True, "bias": "lora_only"}),
    "alora": Recipe(
        peft.LoraConfig,
        {**_LORA, "alora_invocation_tokens": INVOCATION},
        lambda places: {
            "target_modules": list(places.attention)
        },  # peft cannot run it on OPT's MLP
        text=True,
    ),
    "pissa": Recipe(peft.LoraConfig, {**_LORA, "init_lora_weights": "pissa"}),
    "pissa-dora": Recipe(
        peft.LoraConfig, {**_LORA, "init_lora_weights": "pissa", "use_dora": True}
    ),
    "olora": Recipe(peft.LoraConfig, {**_LORA, "init_lora_weights": "olora"}, conv1d=False),
    "adalora": Recipe(peft.AdaLoraConfig, _ADALORA, after=_keep_ranks),
    "adalora-bias": Recipe(peft.AdaLoraConfig, {**_ADALORA, "bias": "lora_only", "lora_alpha": 0}),
    "ia3": Recipe(peft.IA3Config, placed=_ia3),
    "ia3-odd": Recipe(peft.IA3Config, placed=_ia3_odd),
    "vera": Recipe(peft.VeraConfig, {"r": 6}),
    "vera-seed": Recipe(
        peft.VeraConfig,
        {"r": 6, "save_projection": False, "projection_prng_key": 3, "bias": "vera_only"},
    ),
    "pvera": Recipe(peft.PveraConfig, {"r": 6}),
    "pvera-seed": Recipe(peft.PveraConfig, {"r": 6, "save_projection": False}),
    "loha": Recipe(
        peft.LoHaConfig,
        {"r": 3, "alpha": 5, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
        conv1d=False,
    ),
    "lokr": Recipe(peft.LoKrConfig, {"r": 3, "alpha": 5}, conv1d=False),
    "lokr-both": Recipe(
        peft.LoKrConfig,
        {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 8},
        conv1d=False,
    ),
    "hra": Recipe(peft.HRAConfig, {"r": 5, "bias": "hra_only"}, conv1d=False),
    "hra-gs": Recipe(peft.HRAConfig, {"r": 4, "apply_GS": True}, conv1d=False),
    "vblora": Recipe(
        peft.VBLoRAConfig,
        {"r": 4, "num_vectors": 12, "vector_length": 8, "topk": 2, "init_vector_bank_bound": 0.4},
    ),
    "delora": Recipe(peft.DeloraConfig, {"r": 4, "delora_lambda": 6}, conv1d=False),
    "gralora": Recipe(
        peft.GraloraConfig,
        {"r": 4, "gralora_k": 2, "hybrid_r": 2, "alpha": 6},
    ),
    "miss": Recipe(peft.MissConfig, {"r": 5}, conv1d=False),
    "miss-mini": Recipe(
        peft.MissConfig, {"r": 4, "mini_r": 8, "init_weights": "mini"}, conv1d=False
    ),
    "beft": Recipe(peft.BeftConfig, conv1d=False),
    "deft": Recipe(peft.DeftConfig, {"r": 4, "alpha": 6}),
    "deft-qr": Recipe(peft.DeftConfig, {"r": 4, "decomposition_method": "qr"}),
    "tinylora": Recipe(peft.TinyLoraConfig, {"r": 2, "u": 3, "weight_tying": 0.5}),
    "tinylora-seed": Recipe(
        peft.TinyLoraConfig,
        {"r": 3, "u": 4, "save_projection": False, "bias": "tinylora_only", "projection_seed": 7},
    ),
    "unilora": Recipe(
        peft.UniLoraConfig, {"r": 4, "theta_d_length": 150, "init_theta_d_bound": 0.9}
    ),
    "unilora-bias": Recipe(
        peft.UniLoraConfig,
        {"r": 3, "theta_d_length": 1000, "bias": "unilora_only", "init_theta_d_bound": 0.9},
    ),
    "glora": Recipe(peft.GloraConfig, {"r": 3, "config_A_B": "vector"}, conv1d=False),
    "glora-constant": Recipe(
        peft.GloraConfig,
        {"r": 3, "config_A_B": "constant", "config_C": "vector", "config_D_E": "vector"},
        conv1d=False,
    ),
    "ln-tuning": Recipe(
        peft.LNTuningConfig, placed=lambda places: {"target_modules": list(places.norms)}
    ),
    "tokens": Recipe(peft.TrainableTokensConfig, {"token_indices": _TOKENS}, _nowhere),
    "lora-tokens": Recipe(peft.LoraConfig, {**_LORA, "trainable_token_indices": _TOKENS}),
    "lora-tokens-of-each": Recipe(
        peft.LoraConfig,
        _LORA,
        lambda places: {
            "target_modules": list(places.mlp),
            "trainable_token_indices": {places.embedding: _TOKENS, places.head: [61, 3]},
        },
        text=True,
    ),
    "lora-embedding": Recipe(
        peft.LoraConfig, _LORA, lambda places: {"target_modules": [places.embedding, places.last]}
    ),
    "dora-embedding": Recipe(
        peft.LoraConfig,
        {**_LORA, "use_dora": True},
        lambda places: {"target_modules": [places.embedding, places.last]},
    ),
    "lora-embedding-head": Recipe(
        peft.LoraConfig,
        _LORA,
        lambda places: {"target_modules": [places.embedding, places.head, places.last]},
        text=True,
    ),
    "lora-embedding-saved": Recipe(
        peft.LoraConfig, _LORA, _lora_and(lambda places: [places.embedding])
    ),
    "lora-embedding-tied": Recipe(
        peft.LoraConfig,
        {**_LORA, "ensure_weight_tying": True},
        lambda places: {"target_modules": [places.embedding, places.last]},
    ),
    "lora-embedding-saved-tied": Recipe(
        peft.LoraConfig,
        {**_LORA, "ensure_weight_tying": True},
        _lora_and(lambda places: [places.embedding]),
    ),
    "lora-head-saved": Recipe(
        peft.LoraConfig, _LORA, _lora_and(lambda places: [places.head]), text=True
    ),
    "ia3-all-saved": Recipe(
        peft.IA3Config,
        placed=lambda places: {
            "target_modules": [places.last],
            "feedforward_modules": [],
            "modules_to_save": [
                *filter(None, (places.embedding, places.head, places.mlp[0], places.attention[0]))
            ],
        },
    ),
    "lora-norms-saved": Recipe(
        peft.LoraConfig, _LORA, _lora_and(lambda places: [places.norms[0], places.last_norm])
    ),
    "para": Recipe(peft.DeftConfig, {"r": 4, "para": True}),
    "prompt": Recipe(peft.PromptTuningConfig, {"num_virtual_tokens": 21}, _nowhere),
    "multitask": Recipe(
        peft.MultitaskPromptTuningConfig, {"num_virtual_tokens": 5, "num_ranks": 2}, _nowhere
    ),
    "p-tuning": Recipe(
        peft.PromptEncoderConfig, {"num_virtual_tokens": 6, "encoder_hidden_size": 32}, _nowhere
    ),
    "p-tuning-lstm": Recipe(
        peft.PromptEncoderConfig,
        {
            "num_virtual_tokens": 4,
            "encoder_hidden_size": 24,
            "encoder_reparameterization_type": "LSTM",
        },
        _nowhere,
    ),
    "cpt": Recipe(peft.CPTConfig, {"cpt_token_ids": [5, 9, 11, 40]}, _nowhere, text=True),
    "prefix": Recipe(peft.PrefixTuningConfig, {"num_virtual_tokens": 19}, _nowhere),
    "prefix-mlp": Recipe(
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 32},
        _nowhere,
    ),
    "cartridge": Recipe(peft.CartridgeConfig, {"num_virtual_tokens": 17}, _nowhere),
}
"""Name → how to make it."""


def methods_of(arch: str) -> list[str]:
    """Those that peft has for the architecture."""
    return [
        name
        for name, recipe in METHODS.items()
        if (recipe.conv1d or arch != "gpt2") and (PLACES[arch].head or not recipe.text)
    ]


def make_method(method: str, arch: str, base: nn.Module, directory: Path) -> Path:
    """Makes an adapter for a fresh copy of the base, and saves it."""
    recipe = METHODS[method]
    seed = zlib.crc32(f"{method} {arch}".encode())
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # of peft's initial weights
        model = peft.get_peft_model(copy.deepcopy(base), recipe.config(arch))
        shake(model, seed)
        recipe.after(model.peft_config["default"], PLACES[arch])
        model.save_pretrained(directory)
    return directory


@torch.no_grad()
def peft_rows(base: nn.Module, directory: Path | None, ids: list[int]) -> torch.Tensor:
    """What peft computes: float32 [len(ids), vocab]; directory None is the base."""
    model = loaded(base, directory)
    answer = model(torch.tensor([ids]), use_cache=False, **multitask_ids(model))
    logits: torch.Tensor = answer.logits[0]
    return logits[-len(ids) :]  # behind virtual tokens


def loaded(base: nn.Module, directory: Path | None) -> Any:
    """A copy of the base, with peft's adapter on it."""
    model: Any = copy.deepcopy(base)
    if directory is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, directory)
    return model.eval()


def multitask_ids(model: Any) -> Mapping[str, torch.Tensor]:
    """What peft's multitask prompt tuning must be told besides the tokens."""
    configs = getattr(model, "peft_config", {})
    multitask = any(isinstance(c, peft.MultitaskPromptTuningConfig) for c in configs.values())
    return {"task_ids": torch.tensor([0])} if multitask else {}


@torch.no_grad()
def shake(model: nn.Module, seed: int) -> None:
    """Moves every trained tensor by a fair part of its size, and no less than of a size that
    matters; a lone number acts on whole modules, so that a little matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        width = parameter.shape[-1] if parameter.numel() > 1 else 32
        size = max(float(parameter.abs().mean()), 0.3 * width**-0.5)
        parameter.add_(0.5 * size * torch.randn(parameter.shape, generator=generator))
