"""The adapted model's own promises: names, shared weights, sampled rows, every kind of edit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from manylora_testing import FlatRunner, Stream, peft_greedy, tiny_lora, tiny_model
from manylora_testing.models import PACKED
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from manylora import kernels
from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.lowering.tied import tied_modules
from manylora.kernels import EditTable, make_batch, make_plan, reference
from manylora.server.engine.model import AdaptedModel, StepInputs, load_model
from manylora.server.engine.model.limits import max_context
from manylora.server.engine.packing import pack

CPU = torch.device("cpu")
IDS = [5, 17, 40, 8, 61, 33, 90, 2, 11]


def load(base: Path) -> AdaptedModel:
    return load_model(base, "float32", CPU, reference)


def attach_cache(model: AdaptedModel, blocks: int = 2) -> None:
    model.attach_cache(
        [
            (torch.zeros(blocks, heads, 16, dim), torch.zeros(blocks, heads, 16, dim))
            for heads, dim in model.kv_layout
        ]
    )


def inputs(slots: list[int], sample_rows: list[int]) -> StepInputs:
    """len(slots) / 9 sequences of IDS from their start."""
    count = len(slots) // len(IDS)
    counts = np.full(count, len(IDS), np.int32)
    rows = np.array(slots, np.int32)
    return StepInputs(
        token_ids=torch.tensor(IDS * count),
        positions=torch.arange(len(IDS)).repeat(count),
        plan=make_plan(rows),
        head_plan=make_plan(rows[sample_rows]),
        attention=make_batch(counts, counts, np.arange(count, dtype=np.int32)[:, None], 16),
        sample_rows=torch.tensor(sample_rows, dtype=torch.long),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_models_head(tied: bool, dtype: str, tmp_path: Path) -> None:
    """Its weight is held once, as the embedding's or beside it, and nothing by its file."""
    base = tiny_model("qwen3", tmp_path, tie_word_embeddings=tied, **PACKED)
    model = load_model(base, dtype, CPU, kernels.select(CPU))
    assert str(base) not in Path("/proc/self/maps").read_text()
    embedding = "model.embed_tokens"
    assert model.packed
    assert tied_modules(embedding, model.modules) == ["lm_head"] * tied
    names = [name for name, _ in model.model.named_parameters(remove_duplicate=False)]
    assert ("lm_head.weight" in names) == (tied or dtype == "float32")
    head = model.parameter("lm_head.weight")
    wanted = load_file(base / "model.safetensors")[f"{embedding if tied else 'lm_head'}.weight"]
    assert head is not None
    assert torch.equal(head, wanted.to(head.dtype))


def test_tree_keeps_its_names_and_its_tensors(tmp_path: Path) -> None:
    base = tiny_model("qwen3", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = load_model(base, "float32", CPU, reference, fused=False)
    assert list(model.model.state_dict()) == list(plain.state_dict())
    # tied: adapting the head leaves it the embedding's own tensor
    embedding = model.model.get_input_embeddings()
    assert model.parameter("lm_head.weight") is embedding.weight
    assert model.parameter("model.embed_tokens.weight") is embedding.weight
    assert model.parameter("model.layers.7.mlp.up_proj.weight") is None
    assert model.parameter("model.config") is None


def test_modules_and_sizes(tmp_path: Path) -> None:
    model = load(tiny_model("gpt2", tmp_path))
    assert model.modules["transformer.h.1.attn.c_attn"] == ModuleShape(ModuleKind.CONV1D, 48, 144)
    assert model.modules["lm_head"] == ModuleShape(ModuleKind.LINEAR, 48, 96, tied=True)
    assert model.modules["transformer.wte"] == ModuleShape(ModuleKind.EMBEDDING, 96, 48)
    assert model.modules["transformer.h.0.ln_1"] == ModuleShape(ModuleKind.NORM, 48, 48)
    assert len(model.modules) == 9 + 1 + 5
    assert (model.vocab_size, model.max_context, model.eos_token_ids) == (96, 128, (2,))
    assert (model.kv_layout, model.dtype) == ([(4, 12), (4, 12)], torch.float32)


def test_experts_are_not_adaptable(tmp_path: Path) -> None:
    model = load(tiny_model("mixtral", tmp_path))
    assert not [name for name in model.modules if "mlp" in name or "experts" in name]


def test_context_ends_where_rows_would_depend_on_each_other(tmp_path: Path) -> None:
    model = load(tiny_model("phi3-longrope", tmp_path))
    assert model.config.max_position_embeddings == 128
    assert model.max_context == max_context(model.config) == 64


def test_eos_ids_of_the_generation_config_come_first(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path)
    (base / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load(base).eos_token_ids == (7, 9)


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    assert load_model(base, "auto", CPU, reference).dtype is torch.bfloat16


@pytest.mark.parametrize("arch", ["gemma2", "cohere", "granite", "opt-350m"])
def test_logits_only_of_sampled_rows(arch: str, tmp_path: Path) -> None:
    """Also where the model does something to its logits after the head."""
    model = load(tiny_model(arch, tmp_path))
    attach_cache(model)
    slots = [-1] * len(IDS)
    every = model.forward(inputs(slots, list(range(len(IDS)))))
    assert every.dtype is torch.float32
    some = model.forward(inputs(slots, [7, 2]))
    torch.testing.assert_close(some, every[[7, 2]], rtol=0, atol=1e-5)
    assert model.forward(inputs(slots, [])).shape == (0, model.vocab_size)


def random_edit(shape: ModuleShape, seed: int) -> ModuleEdit:
    g = torch.Generator().manual_seed(seed)
    return ModuleEdit(
        a=torch.randn(3, shape.in_size, generator=g) / shape.in_size**0.5,
        b=torch.randn(shape.out_size, 3, generator=g) * 0.2,
        scale=0.7,
        in_scale=1 + 0.2 * torch.randn(shape.in_size, generator=g),
        out_scale=1 + 0.2 * torch.randn(shape.out_size, generator=g),
        bias=0.2 * torch.randn(shape.out_size, generator=g),
    )


def merge(weight: Tensor, bias: Tensor | None, edit: ModuleEdit, kind: ModuleKind) -> None:
    """y = out_scale * (W (in_scale * x) + b) + scale * B A x + bias, as one W and one b."""
    assert edit.a is not None and edit.b is not None and bias is not None
    assert edit.in_scale is not None and edit.out_scale is not None
    w = weight.T if kind is ModuleKind.CONV1D else weight
    w.copy_(edit.out_scale[:, None] * w * edit.in_scale + edit.scale * edit.b @ edit.a)
    bias.copy_(edit.out_scale * bias + edit.bias)


@pytest.mark.parametrize("arch", ["opt", "gpt2", "bloom"])
@torch.no_grad()
def test_every_kind_of_edit_equals_merged_weights(arch: str, tmp_path: Path) -> None:
    base = tiny_model(arch, tmp_path)
    model = load(base)
    names = [
        name
        for name, shape in model.modules.items()
        if shape.kind in (ModuleKind.LINEAR, ModuleKind.CONV1D) and name != "lm_head"
    ]
    edits = {name: random_edit(model.modules[name], i) for i, name in enumerate(names)}
    merged = AutoModelForCausalLM.from_pretrained(base).eval()
    for name, edit in edits.items():
        module = merged.get_submodule(name)
        merge(module.weight, module.bias, edit, model.modules[name].kind)

    ids = {name: i for i, name in enumerate(model.modules)}
    packed = pack(LoweredAdapter(edits), ids, reference, torch.float32)
    table = EditTable(2, len(ids))
    table.write(1, packed.rank, packed.scale, packed.offsets_at(0))
    model.bind(packed.buffer, table)
    attach_cache(model)
    slots = [1] * len(IDS) + [-1] * len(IDS)
    logits = model.forward(inputs(slots, list(range(len(slots)))))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    for rows, oracle in ((logits[: len(IDS)], merged), (logits[len(IDS) :], plain)):
        wanted = oracle(torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-4)


def test_in_scale_of_the_head(tmp_path: Path) -> None:
    model = load(tiny_model("llama", tmp_path))
    attach_cache(model)
    before = model.forward(inputs([-1] * 9, [8]))
    shape = model.modules["lm_head"]
    edit = replace(
        random_edit(shape, 1), a=None, b=None, in_scale=torch.full((shape.in_size,), 3.0)
    )
    ids = {name: i for i, name in enumerate(model.modules)}
    packed = pack(LoweredAdapter({"lm_head": edit}), ids, reference, torch.float32)
    table = EditTable(1, len(ids))
    table.write(0, packed.rank, packed.scale, packed.offsets_at(0))
    model.bind(packed.buffer, table)
    assert edit.out_scale is not None and edit.bias is not None
    after = model.forward(inputs([0] * 9, [8]))
    torch.testing.assert_close(after, edit.out_scale * 3 * before + edit.bias, rtol=0, atol=1e-4)


def test_text_equals_transformers_generate(tmp_path: Path) -> None:
    """The oracle itself against transformers' cached generation, on a model with windows."""
    base = tiny_model("gemma3", tmp_path / "base")
    adapter = tiny_lora(
        base, tmp_path / "adapter", r=4, alpha=8, targets=["q_proj", "up_proj"], seed=1
    )
    backend = kernels.select(CPU)
    runner = FlatRunner(load_model(base, "float32", CPU, backend), {"a": adapter}, backend)
    streams = [Stream("a", IDS * 3), Stream(None, IDS)]
    runner.run(streams, chunk=10, new_tokens=12)
    assert streams[0].generated == peft_greedy(base, adapter, IDS * 3, 12)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    text = plain.generate(
        torch.tensor([IDS]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert streams[1].generated == text[0, len(IDS) :].tolist()
