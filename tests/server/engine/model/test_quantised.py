"""Bases with bitsandbytes' weights of 4 and 8 bits, against transformers + peft on the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from manylora_testing.classifiers import tiny_encoder
from manylora_testing.flat import FlatRunner, Stream
from manylora_testing.methods import loaded, make_method, peft_rows
from manylora_testing.models import VOCAB, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from manylora import kernels
from manylora.adapters_store.format import read_checkpoint
from manylora.errors import FailedPrecondition, MissingExtra
from manylora.server.engine.model import AdaptedModel, load_base, load_model
from manylora.server.engine.model import quantised as module
from manylora.server.engine.model.quantised import product, settle, weight
from manylora.server.offline.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "int8-outliers": {"load_in_8bit": True, "llm_int8_threshold": 2.5},
}
SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
}
METHODS = [
    *("lora", "lora_bias", "adalora", "ia3", "vera", "pvera", "vblora", "gralora", "miss", "beft"),
    *("ln-tuning", "lora-tokens", "lora-embedding-head", "prompt", "prefix"),
]


def quantise(kind: str, directory: Path, arch: str = "llama", *, whole_blocks: bool = True) -> Path:
    """A tiny base, saved by transformers with quantised weights."""
    pytest.importorskip("bitsandbytes")
    made = tiny_model(arch, directory / "whole", **(SIZES[arch] if whole_blocks else {}))
    config = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(
        made, quantization_config=config, device_map={"": CPU}, dtype=torch.float32
    )
    model.save_pretrained(directory / "base")
    return directory / "base"


def read(base: Path) -> Any:
    """As transformers has it."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return settle(model.eval())


def serve(base: Path) -> AdaptedModel:
    return load_model(base, "auto", CPU, kernels.select(CPU))


@pytest.mark.parametrize(("kind", "arch"), [("nf4", "llama"), ("nf4", "opt"), ("int8", "llama")])
def test_mixed_batch_is_pefts(kind: str, arch: str, tmp_path: Path) -> None:
    base = quantise(kind, tmp_path, arch)
    model = read(base)
    # peft's DoRA cannot run on 8-bit weights on a CPU
    names = [*METHODS, *(("dora", "lora-bias-only") if kind == "nf4" else ())]
    adapters = {name: make_method(name, arch, model, tmp_path / name) for name in names}
    backend = kernels.select(CPU)
    runner = FlatRunner(serve(base), adapters, backend, blocks=2 * len(adapters) + 8)
    generator = torch.Generator().manual_seed(5)
    streams = [
        Stream(
            name,
            torch.randint(3, VOCAB, (9 + i % 5,), generator=generator).tolist(),
            watched=True,
            starts_at=i % 3,
        )
        for i, name in enumerate([None, *adapters])
    ]
    runner.run(streams, chunk=4, new_tokens=1)
    for stream in streams:
        plain = peft_rows(model, None, stream.prompt)
        right = peft_rows(model, adapters.get(stream.adapter or ""), stream.prompt)
        found = torch.stack([stream.rows[i] for i in range(len(stream.prompt))])
        assert float((found - right).abs().max()) < 1e-4, stream.adapter
        assert stream.adapter is None or float((right - plain).abs().max()) > 1e-2


@torch.inference_mode()
def test_rows_with_outliers_stand_alone(tmp_path: Path) -> None:
    """bitsandbytes mixes rows that come together where one has an outlier; ours are what it makes
    of each alone, as when one token is decoded after the other."""
    base = quantise("int8-outliers", tmp_path)
    model = read(base)
    projection = model.model.layers[0].mlp.down_proj
    rows = torch.randn(6, projection.in_features, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([projection(row[None]) for row in rows])
    together = projection(rows)
    assert not torch.allclose(together, alone, atol=1e-3)
    torch.testing.assert_close(product(projection, rows), alone, rtol=0, atol=1e-5)
    adapters = {"lora": make_method("lora", "llama", model, tmp_path / "lora")}
    prompt = list(range(20, 29))
    stream = Stream("lora", prompt, watched=True)
    FlatRunner(serve(base), adapters, kernels.select(CPU)).run([stream], chunk=4, new_tokens=1)
    right = one_by_one(model, adapters["lora"], prompt)
    found = torch.stack([stream.rows[i] for i in range(len(prompt))])
    assert float((found - right).abs().max()) < 1e-4
    assert float((peft_rows(model, adapters["lora"], prompt) - right).abs().max()) > 1e-3


def one_by_one(model: Any, adapter: Path, ids: list[int]) -> torch.Tensor:
    """peft's logits [len(ids), vocab], a token at a time."""
    asked, cache, rows = loaded(model, adapter), None, []
    for token in ids:
        out = asked(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_weights_are_dequantised(kind: str, tmp_path: Path) -> None:
    """Also after forward passes; the products are theirs."""
    base = quantise(kind, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    model = read(base)
    served = serve(base)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        found = served.parameter(f"{name}.weight")
        assert found is not None and found.dtype == torch.float32
        error = (found - whole.get_submodule(name).weight).abs().max()
        assert 0 < error < 0.18 * whole.get_submodule(name).weight.abs().max()
        projection = model.get_submodule(name)
        x = torch.randn(3, projection.in_features, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            projection(x)
            torch.testing.assert_close(weight(projection), found)
            exact = kind != "int8"
            torch.testing.assert_close(
                product(projection, x), x @ found.T, rtol=0, atol=1e-5 if exact else 0.1
            )


def test_what_the_library_reads_wrongly_is_refused(tmp_path: Path) -> None:
    base = quantise("nf4", tmp_path, whole_blocks=False)
    with pytest.raises(FailedPrecondition, match="rows of 48 in blocks of 64"):
        serve(base)


@pytest.mark.parametrize("method", ["loha", "hra", "olora", "deft"])
def test_what_peft_does_not_do_with_them_is_refused(method: str, tmp_path: Path) -> None:
    base = quantise("nf4", tmp_path)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    adapter = read_checkpoint(make_method(method, "llama", whole, tmp_path / method))
    with pytest.raises(FailedPrecondition, match="quantise"):
        serve(base).lower(adapter)


def test_a_quantised_module_is_not_replaced_whole(tmp_path: Path) -> None:
    base = quantise("nf4", tmp_path)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    adapter = make_method("ia3-all-saved", "llama", whole, tmp_path / "saved")
    with pytest.raises(FailedPrecondition, match="cannot be replaced whole"):
        serve(base).lower(read_checkpoint(adapter))


def test_merging_into_them_is_refused(tmp_path: Path) -> None:
    base = quantise("nf4", tmp_path)
    with pytest.raises(FailedPrecondition, match="rounded away"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def quantised_config(directory: Path, **config: Any) -> Path:
    """A base whose config.json says that it is quantised; its weights are not asked."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": config}
    path.write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "llm_int8_has_fp16_weight": True, "load_in_8bit": True},
    ],
)
def test_other_ways_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    base = quantised_config(tiny_model("llama", tmp_path), **config)
    with pytest.raises(FailedPrecondition, match="quantised in this way"):
        serve(base)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", {"accelerate": sys}.get)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = quantised_config(tiny_model("llama", tmp_path), **config)
    with pytest.raises(MissingExtra, match=r"needs bitsandbytes; wanted .*manylora\[bnb\]"):
        serve(base)


def test_encoders_are_refused(tmp_path: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = quantised_config(tiny_encoder("bert", tmp_path), **config)
    with pytest.raises(FailedPrecondition, match="a quantised encoder"):
        load_base(base, "auto", CPU, kernels.select(CPU))
