"""LoRA, lowered, is what peft computes; what is not understood is refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from manylora_testing.models import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora.adapters_store.edits import LoweredAdapter, ModuleKind, ModuleShape
from manylora.adapters_store.format import read_checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering import check_config, lower
from manylora.errors import FailedPrecondition, InvalidArgument, ManyloraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QV = ["q_proj", "v_proj"]
TOKENS = torch.tensor([[3, 17, 5, 80, 41, 9, 2]])
Bases = Callable[[str], nn.Module]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Fresh copies of tiny models, each made once."""
    made: dict[str, nn.Module] = {}

    def get(arch: str) -> nn.Module:
        if arch not in made:
            directory = tiny_model(arch, tmp_path_factory.mktemp(arch))
            made[arch] = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return copy.deepcopy(made[arch]).eval()

    return get


def make_lora(base: nn.Module, directory: Path, seed: int = 0, **options: Any) -> Path:
    """Made and saved by peft itself, with random A and B."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": QV, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    return directory


def shapes(base: nn.Module) -> dict[str, ModuleShape]:
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = ModuleShape(ModuleKind.LINEAR, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = ModuleShape(ModuleKind.CONV1D, *module.weight.shape)
        elif isinstance(module, nn.Embedding):
            found[name] = ModuleShape(
                ModuleKind.EMBEDDING, module.num_embeddings, module.embedding_dim
            )
    return found


def lower_for(base: nn.Module, adapter: Path) -> LoweredAdapter:
    parameters = dict(base.named_parameters(remove_duplicate=False))
    checkpoint = read_checkpoint(adapter)
    check_config(checkpoint, Limits())
    return lower(checkpoint, shapes(base), parameters.get)


@torch.no_grad()
def logits_with_edits(base: nn.Module, lowered: LoweredAdapter) -> torch.Tensor:
    """The base with y += scale · B (A x) at every edit, and nothing else of the adapter's."""

    def hook(edit: Any) -> Callable[..., torch.Tensor]:
        a, b = edit.a.float(), edit.b.float()
        return lambda _module, x, y: y + edit.scale * (x[0] @ a.T @ b.T)

    hooks = [
        base.get_submodule(name).register_forward_hook(hook(edit))
        for name, edit in lowered.edits.items()
    ]
    logits = base(TOKENS, use_cache=False).logits
    for handle in hooks:
        handle.remove()
    return logits


@torch.no_grad()
def logits_of_peft(base: nn.Module, adapter: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    return model(TOKENS, use_cache=False).logits


def assert_as_peft(base: nn.Module, adapter: Path) -> LoweredAdapter:
    lowered = lower_for(base, adapter)
    plain = logits_with_edits(base, LoweredAdapter({}))
    ours = logits_with_edits(base, lowered)
    right = logits_of_peft(base, adapter)  # changes the base
    assert (right - plain).abs().max() > 1e-2, "the adapter does nothing"
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=2e-5)
    return lowered


def edit_config(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **changes}))


def rename(adapter: Path, new_name: Callable[[str], str]) -> None:
    tensors = {new_name(name): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": QV}),
    "rslora": ("llama", {"target_modules": QV, "use_rslora": True}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"self_attn.k_proj": 2, r".*\.1\..*(q|o)_proj": 9, "up_proj": 1},
            "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3, "q_proj": 20, "k_proj": 5},
        },
    ),
    "rslora-patterns": (
        "llama",
        {
            "target_modules": [*QV, "mlp.down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 7},
            "alpha_pattern": {r"layers.1.*": 5},
        },
    ),
    "layers": ("llama", {"target_modules": QV, "layers_to_transform": [1]}),
    "one-layer-of-pattern": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"},
    ),
    "regular-expression": (
        "llama",
        {
            "target_modules": r".*layers\.\d+\.(self_attn\.[qk]|mlp\.up)_proj",
            "exclude_modules": r".*\.1\..*k_proj",
        },
    ),
    "excluded": ("llama", {"target_modules": QV, "exclude_modules": ["layers.0.self_attn.v_proj"]}),
    "full-names": ("llama", {"target_modules": ["model.layers.1.mlp.gate_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-all": ("gpt2", {"target_modules": "all-linear"}),
    "projected-embeddings": ("opt-350m", {"target_modules": "all-linear"}),
    "packed": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "neox-all": ("gpt_neox", {"target_modules": "all-linear"}),
    "bloom": ("bloom", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-head": ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
    "gaussian": ("llama", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": QV, "init_lora_weights": "mica"}),
    "no-init": ("llama", {"target_modules": QV, "init_lora_weights": False}),
    "dropout": ("llama", {"target_modules": QV, "lora_dropout": 0.5}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_as_peft(case: str, bases: Bases, tmp_path: Path) -> None:
    arch, options = CASES[case]
    adapter = make_lora(bases(arch), tmp_path, **options)
    lowered = assert_as_peft(bases(arch), adapter)
    assert not any("lm_head" in name or "embed_out" in name for name in lowered.edits) or (
        "head" in case
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "opt-350m"])
@pytest.mark.filterwarnings("ignore")
def test_all_linear_left_as_a_word(arch: str, bases: Bases, tmp_path: Path) -> None:
    make_lora(bases(arch), tmp_path, seed=2, target_modules="all-linear")
    edit_config(tmp_path, target_modules="all-linear")
    assert_as_peft(bases(arch), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_files(dtype: torch.dtype, bases: Bases, tmp_path: Path) -> None:
    make_lora(bases("llama"), tmp_path, seed=3, target_modules=QV)
    halves = {name: t.to(dtype) for name, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(halves, tmp_path / WEIGHTS)
    lowered = assert_as_peft(bases("llama"), tmp_path)
    assert {edit.a.dtype for edit in lowered.edits.values()} == {dtype}


@pytest.mark.parametrize(
    "new_name",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model.").replace(".weight", ".my-1.weight"),
    ],
)
def test_other_tensor_names(new_name: Callable[[str], str], bases: Bases, tmp_path: Path) -> None:
    make_lora(bases("llama"), tmp_path, seed=4, target_modules=QV)
    base = bases("llama")
    expected = lower_for(base, tmp_path)
    rename(tmp_path, new_name)
    found = lower_for(base, tmp_path)
    assert found.edits.keys() == expected.edits.keys()
    for name, edit in found.edits.items():
        assert torch.equal(edit.a, expected.edits[name].a)
        assert torch.equal(edit.b, expected.edits[name].b)
        assert edit.scale == expected.edits[name].scale


@pytest.mark.filterwarnings("ignore")
def test_converted_pissa(bases: Bases, tmp_path: Path) -> None:
    """save_pretrained's own conversion to plain LoRA of rank 2r, and PiSSA itself, are one edit."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=QV, init_lora_weights="pissa")
    model = peft.get_peft_model(bases("llama"), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    for kind in ("raw", "converted"):
        edit_config(tmp_path / kind, task_type="CAUSAL_LM")
    converted = assert_as_peft(bases("llama"), tmp_path / "converted")
    raw = lower_for(bases("llama"), tmp_path / "raw")
    assert raw.edits.keys() == converted.edits.keys()
    for name, edit in raw.edits.items():
        other = converted.edits[name]
        change, wanted = (e.scale * (e.b.double() @ e.a.double()) for e in (edit, other))
        torch.testing.assert_close(change, wanted, rtol=0, atol=2e-5)
    with pytest.raises(FailedPrecondition, match="own weight"):
        lower(read_checkpoint(tmp_path / "raw"), shapes(bases("llama")))


INVOKED = {"alora_invocation_tokens": [5, 6]}
NOT_SERVED: dict[str, tuple[dict[str, Any], str]] = {
    "alora-saved": ({**INVOKED, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "alora-bias": ({**INVOKED, "bias": "lora_only"}, "bias"),
    "alora-tokens": ({**INVOKED, "trainable_token_indices": [4]}, "trainable_token_indices"),
    "alora-task": ({**INVOKED, "task_type": None}, "task_type"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "pissa-fast": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "kasa": ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "kasa_config"),
    "velora": ({"velora_config": peft.tuners.lora.config.VeloraConfig()}, "velora_config"),
    "answers": ({"task_type": "QUESTION_ANS"}, "task_type"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOT_SERVED)
def test_what_is_not_served_is_refused_by_name(case: str, bases: Bases, tmp_path: Path) -> None:
    """Saved by peft itself, so that the refusal sees what peft really writes."""
    options, name = NOT_SERVED[case]
    config = peft.LoraConfig(
        **{
            "r": 4,
            "target_modules": QV,
            "task_type": "CAUSAL_LM",
            **options,
            "inference_mode": True,
        }
    )
    base = bases("llama")
    if config.task_type == "QUESTION_ANS":
        base = hf.LlamaForQuestionAnswering(base.config)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(FailedPrecondition, match=name) as caught:
        check_config(read_checkpoint(tmp_path), Limits())
    assert name in caught.value.field


def test_other_peft_types_are_refused_by_name(bases: Bases, tmp_path: Path) -> None:
    config = peft.OFTConfig(target_modules=QV, task_type="CAUSAL_LM")
    peft.get_peft_model(bases("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(FailedPrecondition, match=r"peft_type: .*found 'OFT'; wanted one of .*LORA"):
        check_config(read_checkpoint(tmp_path), Limits())


@pytest.mark.parametrize("value", [None, 1, ["LORA"]])
def test_peft_type_must_be_text(tmp_path: Path, write_checkpoint: Any, value: Any) -> None:
    write_checkpoint(tmp_path, config={"peft_type": value})
    with pytest.raises(InvalidArgument, match="peft_type"):
        check_config(read_checkpoint(tmp_path), Limits())


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"future_option": True}, FailedPrecondition, "future_option"),
        ({"future_option": 0}, FailedPrecondition, "future_option"),
        ({"alora_invocation_tokens": []}, InvalidArgument, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": 5}, InvalidArgument, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [5, -1]}, InvalidArgument, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [5.0]}, InvalidArgument, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": ["5"]}, InvalidArgument, "alora_invocation_tokens"),
        ({**INVOKED, "use_dora": True}, FailedPrecondition, "use_dora"),
        ({**INVOKED, "init_lora_weights": "pissa"}, FailedPrecondition, "init_lora_weights"),
        ({**INVOKED, "init_lora_weights": "olora"}, FailedPrecondition, "init_lora_weights"),
        ({"use_dora": 1}, InvalidArgument, "use_dora"),
        ({"use_dora": True, "lora_bias": True}, FailedPrecondition, "lora_bias"),
        ({"bias": "hra_only"}, FailedPrecondition, "bias"),
        ({"bias": None}, FailedPrecondition, "bias"),
        ({"megatron_config": {"tp": 2}}, FailedPrecondition, "megatron_config"),
        ({"kasa_config": {}}, FailedPrecondition, "kasa_config"),
        ({"target_parameters": ["experts.up"]}, FailedPrecondition, "target_parameters"),
        ({"init_lora_weights": "corda"}, FailedPrecondition, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, FailedPrecondition, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, FailedPrecondition, "init_lora_weights"),
        ({"init_lora_weights": "brand-new"}, FailedPrecondition, "init_lora_weights"),
        ({"init_lora_weights": 1}, FailedPrecondition, "init_lora_weights"),
        ({"init_lora_weights": None}, FailedPrecondition, "init_lora_weights"),
        ({"r": 0}, InvalidArgument, "r"),
        ({"r": -4}, InvalidArgument, "r"),
        ({"r": 4.0}, InvalidArgument, "r"),
        ({"r": True}, InvalidArgument, "r"),
        ({"r": "4"}, InvalidArgument, "r"),
        ({"r": None}, InvalidArgument, "r"),
        ({"r": 257}, InvalidArgument, "r"),
        ({"rank_pattern": {"q_proj": 257}}, InvalidArgument, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 4.5}}, InvalidArgument, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, InvalidArgument, "rank_pattern"),
        ({"rank_pattern": {"(q_proj": 4}}, InvalidArgument, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, InvalidArgument, "alpha_pattern"),
        ({"lora_alpha": None}, InvalidArgument, "lora_alpha"),
        ({"lora_alpha": "8"}, InvalidArgument, "lora_alpha"),
        ({"lora_alpha": 1e30}, InvalidArgument, "lora_alpha"),
        ({"use_rslora": "yes"}, InvalidArgument, "use_rslora"),
        ({"target_modules": None}, InvalidArgument, "target_modules"),
    ],
)
def test_bad_configs(
    tmp_path: Path, write_checkpoint: Any, changes: dict[str, Any], error: Any, field: str
) -> None:
    write_checkpoint(tmp_path, config=changes)
    with pytest.raises(error) as caught:
        check_config(read_checkpoint(tmp_path), Limits())
    assert caught.value.field == f"{CONFIG}: {field}"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["k_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.1\..*"},
    ],
)
def test_tensors_that_the_config_does_not_target(
    tmp_path: Path, write_checkpoint: Any, changes: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path, config=changes)
    with pytest.raises(InvalidArgument, match="does not target this module"):
        check_config(read_checkpoint(tmp_path), Limits())


def test_harmless_options_pass(tmp_path: Path, write_checkpoint: Any) -> None:
    harmless = {
        "merge_weights": False,
        "enable_lora": None,
        "future_option": None,
        "lora_dropout": 0.1,
        "loftq_config": {"loftq_bits": 4},
        "eva_config": {"rho": 2.0},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "revision": "main",
        "peft_version": "0.99.0",
        "layer_replication": [],
        "modules_to_save": [],
    }
    write_checkpoint(tmp_path, config=harmless)
    assert check_config(read_checkpoint(tmp_path), Limits()) == 4


def hostile(name: str, shape: tuple[int, ...] = (4, 8)) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape)}


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            hostile(f"{Q}.lora_magnitude_vector", (8,)),
            "lora_magnitude_vector: .*does not go with the config",
        ),
        (hostile(f"{Q}.lora_embedding_A", (4, 8)), "does not go with the config"),
        (hostile(f"{Q}.lora_B.bias", (8,)), r"lora_B\.bias: .*does not go with the config"),
        (hostile("base_model.model.score.modules_to_save.weight"), "modules_to_save.*not served"),
        (hostile("lora_A.weight"), "wanted"),
        (hostile("nonsense"), "nonsense: .*not served"),
        (hostile(f"{Q}.lora_A.default.weight"), "two tensors of one meaning"),
        (hostile(f"{Q[17:]}.lora_A.weight"), "two tensors of one meaning"),
        (hostile("model.layers.1.self_attn.q_proj.lora_A.other.weight"), "one adapter"),
        (hostile("base_model.model.x.q_proj.lora_A.weight"), r"lora_B\.weight of x\.q_proj"),
        (hostile(f"{Q}.lora_A.weight", (4,)), r"found \[4\]; wanted \[4, any\]"),
        (hostile(f"{Q}.lora_A.weight", (5, 8)), r"found \[5, 8\]; wanted \[4, any\]"),
        (hostile(f"{Q}.lora_B.weight", (8, 3)), r"found \[8, 3\]; wanted \[any, 4\]"),
        (hostile(f"{Q}.lora_B.weight", (4, 8)), r"found \[4, 8\]; wanted \[any, 4\]"),
        (hostile(f"{Q}.lora_B.weight", (8, 4, 1)), r"wanted \[any, 4\]"),
    ],
)
def test_tensors_that_do_not_go_with_the_config(
    tmp_path: Path, write_checkpoint: Any, change: Mapping[str, torch.Tensor], message: str
) -> None:
    write_checkpoint(tmp_path)
    tensors = {**load_file(tmp_path / WEIGHTS), **change}
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(ManyloraError, match=message) as caught:
        check_config(read_checkpoint(tmp_path), Limits())
    assert isinstance(caught.value, InvalidArgument | FailedPrecondition)


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_half_a_pair(tmp_path: Path, write_checkpoint: Any, missing: str) -> None:
    write_checkpoint(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{Q}.{missing}.weight"]
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(InvalidArgument, match=f"go together; wanted {missing}"):
        check_config(read_checkpoint(tmp_path), Limits())


SHAPES = {
    f"model.layers.0.self_attn.{name}_proj": ModuleShape(ModuleKind.LINEAR, 8, 8) for name in "qkv"
}


def test_fits_the_base(tmp_path: Path, write_checkpoint: Any) -> None:
    lowered = lower(read_checkpoint(write_checkpoint(tmp_path)), SHAPES)
    assert lowered.edits.keys() == SHAPES.keys() - {"model.layers.0.self_attn.k_proj"}
    assert {edit.scale for edit in lowered.edits.values()} == {2.0}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "no such module"),
        (
            {**SHAPES, "model.layers.0.self_attn.q_proj": ModuleShape(ModuleKind.LINEAR, 16, 8)},
            rf"{Q}\.lora_A\.weight: .* shape does not fit; found \[4, 8\]; wanted \[4, 16\]",
        ),
        (
            {**SHAPES, "model.layers.0.self_attn.v_proj": ModuleShape(ModuleKind.CONV1D, 8, 24)},
            r"v_proj\.lora_B\.weight: .*found \[8, 4\]; wanted \[24, 4\]",
        ),
        (
            {**SHAPES, "model.layers.1.self_attn.q_proj": ModuleShape(ModuleKind.LINEAR, 8, 8)},
            r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: .*no tensors.*wanted \[4, 8\]",
        ),
        (
            {**SHAPES, "model.layers.0.self_attn.q_proj": ModuleShape(ModuleKind.EMBEDDING, 8, 8)},
            "another kind of module",
        ),
    ],
)
def test_does_not_fit_the_base(
    tmp_path: Path, write_checkpoint: Any, modules: dict[str, ModuleShape], message: str
) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path))
    with pytest.raises(FailedPrecondition, match=message):
        lower(checkpoint, modules)


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_the_base_must_be_the_base(bases: Bases, tmp_path: Path) -> None:
    """peft saves a targeted head's own weights, and overwrites the base's with them on load."""
    adapter = make_lora(bases("llama"), tmp_path / "a", target_modules=["lm_head"])
    base = bases("llama")
    tensors = load_file(adapter / WEIGHTS)
    carried = "base_model.model.lm_head.base_layer.weight"
    assert carried in tensors
    lower_for(base, adapter)
    with pytest.raises(FailedPrecondition, match=f"{carried}: cannot compare"):
        lower(read_checkpoint(adapter), shapes(base))
    for change, message in (
        (tensors[carried] * 1.001, "replaces this parameter"),
        (tensors[carried][:-1], r"another shape; found \[95, 48\]; wanted \[96, 48\]"),
    ):
        changed = shutil.copytree(adapter, tmp_path / message[:5], dirs_exist_ok=True)
        save_file({**tensors, carried: change.contiguous()}, changed / WEIGHTS)
        with pytest.raises(FailedPrecondition, match=message):
            lower_for(base, changed)
