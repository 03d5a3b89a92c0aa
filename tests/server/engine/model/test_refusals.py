"""What cannot be served exactly is refused at load, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from manylora_testing import tiny_model
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding

from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.kernels import reference
from manylora.server.engine.model import load_model

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def load(path: Path, dtype: str = "float32") -> Any:
    return load_model(path, dtype, CPU, reference, fused=False)


def save(config: Any, where: Path) -> Path:
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(where)
    return where


def refusal(path: Path, dtype: str = "float32") -> str:
    with pytest.raises(FailedPrecondition) as caught:
        load(path, dtype)
    assert caught.value.field in {"model", "dtype"}
    return str(caught.value)


CONFIGS = {
    "recurrence": (hf.MambaConfig(**SMALL), "mamba: layers of type linear_attention"),
    "recurrence beside attention": (
        hf.FalconH1Config(**SMALL, head_dim=12, mamba_d_ssm=48, mamba_n_heads=4, mamba_d_state=16),
        "falcon_h1: layers of type hybrid",
    ),
    "attention outside the interface": (
        hf.OpenAIGPTConfig(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=128),
        "found 0 attention layers; wanted 2",
    ),
    "linear attention": (
        hf.Qwen3NextConfig(**SMALL, layer_types=["linear_attention", "full_attention"]),
        "linear_attention",
    ),
    "convolutions": (
        hf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        "conv",
    ),
    "chunked attention": (
        hf.Llama4TextConfig(**SMALL, layer_types=["chunked_attention", "full_attention"]),
        "chunked_attention",
    ),
    "scale by place in the batch": (
        hf.Llama4TextConfig(**SMALL, layer_types=["full_attention", "full_attention"]),
        "place in the batch",
    ),
    "attention of its own": (
        hf.GPTJConfig(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=128, rotary_dim=8),
        "GPTJForCausalLM",
    ),
    "values of another size": (
        hf.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        "different head sizes",
    ),
    "attends twice": (hf.DiffLlamaConfig(**SMALL), "more than once"),
    "bidirectional": (
        hf.BertConfig(**{**SMALL, "num_key_value_heads": 4}, is_decoder=False),
        "not a causal language model",
    ),
    "bidirectional on request": (
        hf.Gemma3TextConfig(**SMALL, head_dim=12, use_bidirectional_attention=True),
        "neither causal",
    ),
    "positions from 2": (
        hf.RobertaConfig(**{**SMALL, "num_key_value_heads": 4}, is_decoder=True),
        "does not count positions from 0",
    ),
    "cross attention": (
        hf.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, add_cross_attention=True),
        "cross attention",
    ),
    "rounded ALiBi": (hf.FalconConfig(**SMALL, alibi=True), "Falcon with ALiBi"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_architectures_that_are_refused(case: str, tmp_path: Path) -> None:
    config, wanted = CONFIGS[case]
    assert wanted in refusal(save(config, tmp_path))


def mixing(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x.roll(1, dims=1)))


def counting(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    places = torch.arange(position_ids.shape[1])
    angles = places[None, :, None] * self.inv_freq.repeat(2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "wrong", "wanted"),
    [
        (LlamaMLP, mixing, "mixes the sequences"),
        (LlamaRotaryEmbedding, counting, "ignores the positions"),
    ],
)
def test_rows_that_do_not_stand_by_themselves(
    method: type,
    wrong: Any,
    wanted: str,
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_model("llama", tmp_path)
    monkeypatch.setattr(method, "forward", wrong)
    assert wanted in refusal(base, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_by_another_formula(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose eager attention does something that it does not tell the interface."""
    eager = modeling_llama.eager_attention_forward

    def scaled_values(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return eager(module, q, k, v * 1.5, *args, **kwargs)

    base = tiny_model("llama", tmp_path)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", scaled_values)
    assert "another formula" in refusal(base, dtype)


@pytest.mark.parametrize("kind", [hf.T5Config, hf.BartConfig, hf.MarianConfig, hf.WhisperConfig])
def test_encoder_decoder(kind: Any, tmp_path: Path) -> None:
    """Also those that transformers has a causal language model or a classifier of."""
    kind(vocab_size=96, d_model=48).save_pretrained(tmp_path)
    assert f"{kind.model_type}: an encoder-decoder model" in refusal(tmp_path)


def test_not_a_language_model(tmp_path: Path) -> None:
    hf.ViTConfig().save_pretrained(tmp_path)
    assert "vit: neither a causal language model nor a known encoder" in refusal(tmp_path)


def edit_config(base: Path, **changes: object) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_unknown_model_type_with_code_of_its_own(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path)
    (base / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(base, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    assert "config.json" in refusal(base)


def test_quantised_checkpoint(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path)
    edit_config(base, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in refusal(base)


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    """transformers would fill both with random numbers."""
    base = tiny_model("llama", tmp_path)
    file = base / "model.safetensors"
    tensors = load_file(file)
    lacking = dict(tensors)
    del lacking["model.layers.1.mlp.up_proj.weight"]
    save_file(lacking, file, {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(base)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, file, {"format": "pt"})
    assert "model.norm.weight [7]" in refusal(base)


def test_only_safetensors(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert "could not be loaded" in refusal(base)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model_type": 3}'])
def test_broken_config(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    refusal(tmp_path)


def test_not_a_directory(tmp_path: Path) -> None:
    assert "not a model directory" in refusal(tmp_path / "nothing")


def test_infinite_logits(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.full((48,), 3e6)
    save_file(tensors, file, {"format": "pt"})
    assert "not finite in torch.float16" in refusal(base, "float16")


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="int8"):
        load(tiny_model("llama", tmp_path), "int8")
