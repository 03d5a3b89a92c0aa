"""Tiny random causal language models, saved as Hugging Face checkpoints."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.2, 1.5, 1.7, 2.0, 2.2],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 64,
}
_OPT = {
    "ffn_dim": 80,
    "word_embed_proj_dim": 48,
    "num_key_value_heads": None,
    "intermediate_size": None,
}
_WINDOWED = ["sliding_attention", "full_attention"]


def _config(kind: type[Any], **changes: Any) -> Callable[[], Any]:
    settings = {**_SIZES, **changes}
    return lambda: kind(**{k: v for k, v in settings.items() if v is not None})


_MULTI_HEAD = {"num_key_value_heads": None}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 80}
_RENAMED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_WITHOUT = dict.fromkeys((*_RENAMED, "num_key_value_heads", "intermediate_size"))

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _config(hf.LlamaConfig, rope_parameters=_LLAMA3_ROPE, head_dim=16),
    "mistral": _config(hf.MistralConfig, sliding_window=7),
    "qwen2": _config(
        hf.Qwen2Config, use_sliding_window=True, sliding_window=5, layer_types=_WINDOWED
    ),
    "qwen3": _config(hf.Qwen3Config, head_dim=16, tie_word_embeddings=True),
    "gemma": _config(hf.GemmaConfig, head_dim=16),
    "gemma2": _config(
        hf.Gemma2Config,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=6,
        layer_types=_WINDOWED,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _config(
        hf.Gemma3TextConfig,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=6,
        layer_types=_WINDOWED,
    ),
    "phi3": _config(hf.Phi3Config, sliding_window=9),
    "phi3-longrope": _config(
        hf.Phi3Config, rope_parameters=_LONG_ROPE, original_max_position_embeddings=64
    ),
    "opt": _config(hf.OPTConfig, **_OPT),
    "opt-350m": _config(
        hf.OPTConfig, **{**_OPT, "word_embed_proj_dim": 24}, do_layer_norm_before=False
    ),
    "gpt2": _config(hf.GPT2Config, **_WITHOUT, **_GPT2),
    "gpt2-scaled": _config(
        hf.GPT2Config,
        **_WITHOUT,
        **_GPT2,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
    ),
    "gpt_neox": _config(hf.GPTNeoXConfig, **_MULTI_HEAD),
    "gpt_neox-sequential": _config(hf.GPTNeoXConfig, **_MULTI_HEAD, use_parallel_residual=False),
    "bloom": _config(hf.BloomConfig, **_MULTI_HEAD, intermediate_size=None, num_attention_heads=6),
    "falcon": _config(
        hf.FalconConfig, num_key_value_heads=None, num_kv_heads=2, new_decoder_architecture=True
    ),
    "falcon-multi-query": _config(hf.FalconConfig, **_MULTI_HEAD, bias=True, parallel_attn=False),
    "smollm3": _config(hf.SmolLM3Config, no_rope_layers=[1, 0]),
    "olmo2": _config(hf.Olmo2Config),
    "cohere": _config(hf.CohereConfig, logit_scale=0.3),
    "cohere2": _config(hf.Cohere2Config, sliding_window=6, layer_types=_WINDOWED, head_dim=16),
    "granite": _config(hf.GraniteConfig, logits_scaling=2.0, attention_multiplier=0.2),
    "starcoder2": _config(hf.Starcoder2Config, sliding_window=6),
    "phi": _config(hf.PhiConfig),
    "gpt_oss": _config(
        hf.GptOssConfig,
        head_dim=16,
        sliding_window=6,
        layer_types=_WINDOWED,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "mixtral": _config(hf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _config(
        hf.Qwen3MoeConfig,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "gptj": _config(hf.GPTJConfig, **_WITHOUT, **_GPT2, rotary_dim=8),
    "dynamic-rope": _config(
        hf.LlamaConfig,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    ),
    "yarn": _config(
        hf.LlamaConfig,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
}
"""Name → maker of its configuration."""


PACKED = {"hidden_size": 64, "intermediate_size": 96}
"""Sizes with which the CPU's own product takes all weights of a layer in bfloat16."""


def tiny_model(arch: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Makes a random model and saves it as float32 safetensors.

    Weights are large enough that logits are of order one, unlike those of a fresh model, so that
    an absolute tolerance means something.

    Args:
        arch: a key of `ARCHITECTURES`.
        directory: where to; made if absent.
        seed: of the weights.
        changes: configuration values other than the architecture's own.

    Returns:
        directory.
    """
    config = ARCHITECTURES[arch]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed + zlib.crc32(arch.encode()))
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Weights of a size that makes outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.2 * noise)  # norms stay around their neutral value
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)
