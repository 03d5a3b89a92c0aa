"""What goes for all PEFT methods alike: options, tensors and shapes are judged by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from manylora_testing.methods import METHODS, PLACES, make_method
from manylora_testing.models import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.format import read_checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering import FAMILIES, check_config, lower
from manylora.adapters_store.lowering.config_reader import COMMON_KEYS
from manylora.errors import FailedPrecondition, InvalidArgument, ManyloraError
from manylora.server.engine.model.adapt import shape_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_KEYS = {"merge_weights"}
METHOD_OF_TYPE = {
    str(recipe.config("opt").peft_type.value): name for name, recipe in METHODS.items()
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A tiny OPT: it has biases everywhere."""
    directory = tiny_model("opt", tmp_path_factory.mktemp("opt"))
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def saved(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Adapters by method, each made once; not to be changed."""
    made: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in made:
            made[method] = make_method(method, "opt", base, tmp_path_factory.mktemp(method))
        return made[method]

    return get


def shapes(base: nn.Module) -> dict[str, ModuleShape]:
    """Of the modules that an engine would adapt."""
    embedding = base.get_input_embeddings()  # type: ignore[operator]
    return {
        name: replace(
            shape_of(module), tied=name == "lm_head" and module.weight is embedding.weight
        )
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm) or module is embedding
    }


def lower_for(base: nn.Module, adapter: Path) -> LoweredAdapter:
    checkpoint = read_checkpoint(adapter)
    rank = check_config(checkpoint, Limits())
    parameters = dict(base.named_parameters(remove_duplicate=False))
    lowered = lower(checkpoint, shapes(base), parameters.get)
    assert max((edit.rank for edit in lowered.edits.values()), default=0) <= rank
    return lowered


def changed(source: Path, target: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A copy with other tensors or config values."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    values = {**json.loads((target / CONFIG).read_text()), **config}
    (target / CONFIG).write_text(json.dumps(values))
    if tensors is not None:
        save_file({name: t.contiguous() for name, t in tensors.items()}, target / WEIGHTS)
    return target


def test_every_family_has_a_recipe() -> None:
    assert set(METHOD_OF_TYPE) == set(FAMILIES)


@pytest.mark.parametrize("peft_type", FAMILIES)
def test_every_option_of_this_peft_is_judged(peft_type: str) -> None:
    """A newer peft with a new option makes this fail, so that somebody looks at it."""
    keys = FAMILIES[peft_type].keys
    known = {*keys.understood, *keys.harmless, *keys.off}
    kind = METHODS[METHOD_OF_TYPE[peft_type]].kind
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields <= known | COMMON_KEYS
    assert known <= fields | OLD_KEYS, "peft ignores these keys"


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_counts(
    method: str, base: nn.Module, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without any one of a module's tensors, or with one of another shape, nothing is lowered."""
    source = saved(method)
    tensors = load_file(source / WEIGHTS)
    lower_for(base, source)
    own = [name for name in tensors if "layers.1." in name and not name.endswith("base_layer.bias")]
    shared = [name for name in tensors if ".layers." not in name and ".lm_head" not in name]
    for name in (*own[:1], *own[-1:], *shared):
        if name.endswith((".bias", ".base_layer.weight")) and "lora_B" not in name:
            continue
        rest = {other: t for other, t in tensors.items() if other != name}
        with pytest.raises(ManyloraError):
            lower_for(base, changed(source, tmp_path, rest))
        wider = {**tensors, name: torch.cat([tensors[name]] * 2)[:-1]}
        if wider[name].shape != tensors[name].shape and not name.endswith(("vera_A", "vera_B")):
            with pytest.raises(ManyloraError, match=r"shape does not fit|not what the config says"):
                lower_for(base, changed(source, tmp_path, wider))
    with pytest.raises(FailedPrecondition, match="not served"):
        lower_for(base, changed(source, tmp_path, {**tensors, "nonsense": torch.ones(2)}))


@pytest.mark.parametrize("method", ["dora", "hra", "deft", "pissa", "olora", "lora-bias-only"])
def test_what_needs_the_base_says_so(method: str, base: nn.Module, saved: Any) -> None:
    with pytest.raises(FailedPrecondition):
        lower(read_checkpoint(saved(method)), shapes(base))


def biased(saved: Callable[[str], Path], target: Path, name: str, new_name: str) -> Path:
    source = saved("lora-bias-only")
    tensors = load_file(source / WEIGHTS)
    tensors[new_name] = tensors.pop(name)
    return changed(source, target, tensors)


LAYER = "base_model.model.model.decoder.layers.1"


def test_a_bias_under_a_name_that_peft_leaves_out(
    base: nn.Module, saved: Any, tmp_path: Path
) -> None:
    name = f"{LAYER}.self_attn.q_proj.base_layer.bias"
    adapter = biased(saved, tmp_path, name, f"{LAYER}.self_attn.q_proj.bias")
    with pytest.raises(FailedPrecondition, match=r"q_proj\.bias: peft leaves this bias out"):
        lower_for(base, adapter)


def test_a_bias_of_a_module_that_is_not_adaptable_must_be_the_bases(
    base: nn.Module, saved: Any
) -> None:
    source = saved("lora-bias-all")
    name = f"{LAYER}.final_layer_norm.bias"
    assert name in load_file(source / WEIGHTS)
    modules = {n: s for n, s in shapes(base).items() if "final_layer_norm" not in n}
    parameters = dict(base.named_parameters())
    with pytest.raises(FailedPrecondition, match=r"final_layer_norm\.bias: .*replaces this"):
        lower(read_checkpoint(source), modules, parameters.get)


def test_a_bias_that_the_base_lacks(base: nn.Module, saved: Any, tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.q_proj.base_layer.bias"
    adapter = biased(saved, tmp_path, name, "base_model.model.lm_head.bias")
    with pytest.raises(FailedPrecondition, match=r"lm_head\.bias: the base has no such bias"):
        lower_for(base, adapter)


def test_biases_without_the_option(base: nn.Module, saved: Any, tmp_path: Path) -> None:
    adapter = changed(saved("lora-bias-only"), tmp_path, bias="none")
    with pytest.raises(FailedPrecondition, match="replaces this parameter of the base"):
        lower_for(base, adapter)


@pytest.mark.parametrize(
    ("method", "changes", "field"),
    [
        ("ia3", {"feedforward_modules": None}, "feedforward_modules"),
        ("ia3", {"layers_to_transform": [0]}, "layers_to_transform"),
        ("ia3", {"feedforward_modules": ["fc1"]}, "fc2.ia3_l"),
        ("vera", {"save_projection": False}, "save_projection"),
        ("vera-seed", {"save_projection": True}, "save_projection"),
        ("vera", {"projection_prng_key": None}, "projection_prng_key"),
        ("pvera", {"sample_at_inference": True}, "sample_at_inference"),
        ("miss", {"init_weights": "bat"}, "init_weights"),
        ("deft", {"decomposition_method": "svd"}, "decomposition_method"),
        ("vblora", {"save_only_topk_weights": True}, "save_only_topk_weights"),
        ("vblora", {"topk": 99}, "topk"),
        ("gralora", {"gralora_k": 3}, "gralora_k"),
        ("adalora", {"rank_pattern": {"x.lora_E": 3}}, "rank_pattern"),
        ("adalora", {"use_dora": True}, "use_dora"),
        ("loha", {"r": 17, "rank_pattern": {}}, "r"),
        ("hra", {"bias": "lora_only"}, "bias"),
        ("beft", {"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ("delora", {"new_option": 1}, "new_option"),
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ("prompt", {"num_virtual_tokens": 20}, "prompt_embeddings"),
        ("prompt", {"task_type": None}, "task_type"),
        ("prefix", {"task_type": None}, "task_type"),
        ("pissa", {"lora_alpha": -1}, "lora_alpha"),
        ("p-tuning", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("multitask", {"num_tasks": 2}, "num_tasks"),
        ("cpt", {"cpt_token_ids": [5, 9, 11]}, "prompt_embeddings"),
        ("prefix", {"num_layers": None}, "num_layers"),
        ("cartridge", {"num_layers": 3}, "prompt_embeddings"),
    ],
)
def test_refused_by_name(
    method: str, changes: dict[str, Any], field: str, saved: Any, base: nn.Module, tmp_path: Path
) -> None:
    source = saved(method)
    tensors = None
    if method == "loha" and "r" in changes:  # of the rank the config says, whose square is too much
        tensors = load_file(source / WEIGHTS)
        tensors = {n: torch.ones(t.shape[0], 17) if n.endswith("_a") else torch.ones(17, t.shape[1])
                   for n, t in tensors.items()}  # fmt: skip
    adapter = changed(source, tmp_path, tensors, **changes)
    with pytest.raises((InvalidArgument, FailedPrecondition)) as caught:
        lower_for(base, adapter)
    assert str(caught.value.field).endswith(field)


def test_ranks_that_adalora_has_dropped(base: nn.Module, saved: Any) -> None:
    """peft scales by the initial rank, not by what is left; a module may have no rank at all."""
    lowered = lower_for(base, saved("adalora"))
    ranks = {name: edit.rank for name, edit in lowered.edits.items()}
    assert ranks["model.decoder.layers.0.self_attn.q_proj"] == 3
    assert ranks["model.decoder.layers.1.self_attn.q_proj"] == 0
    assert ranks["model.decoder.layers.1.self_attn.v_proj"] == 4


def test_edits_are_small_enough_for_float16(base: nn.Module, saved: Any) -> None:
    """Products of small factors are stored as factors of order one and a scale."""
    for method in METHODS:
        for edit in lower_for(base, saved(method)).edits.values():
            _assert_storable(edit)


def _assert_storable(edit: ModuleEdit) -> None:
    for tensor in (edit.a, edit.b, edit.in_scale, edit.out_scale, edit.bias):
        if tensor is not None:
            assert tensor.isfinite().all()
            assert 1e-3 < float(tensor.abs().max()) < 1e4


def test_conv1d_only_where_peft_has_it(base: nn.Module, saved: Any) -> None:
    conv = {
        name: dataclasses.replace(shape, kind=ModuleKind.CONV1D)
        for name, shape in shapes(base).items()
        if shape.kind is ModuleKind.LINEAR
    }
    for method, recipe in METHODS.items():
        if recipe.conv1d or method == "olora":
            continue
        with pytest.raises(FailedPrecondition, match="found conv1d; wanted linear"):
            lower(read_checkpoint(saved(method)), conv, dict(base.named_parameters()).get)
    assert PLACES.keys() >= {"llama", "qwen3", "opt", "gpt2"}
