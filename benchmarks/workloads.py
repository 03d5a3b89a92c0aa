"""The named workloads: what is asked of the server, and the adapters it needs.

Prompts of 128 random token ids, 64 tokens out, greedy, end-of-text ignored, no prefix cache;
adapters on q, k, v, o, gate, up and down of every layer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
MIXED_RANKS = (8, 16, 32, 64)
CHECKPOINTS = 64  # different ones there are; more adapters than that share their files
REGISTERED = (1, 10, 100, 1000)
TARGETS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(slots=True, frozen=True)
class Workload:
    """requests: how many at once. adapters: rank of each adapter there is. picks: which adapter
    each request is on, -1 for the base. resident: adapters that the pool has room for."""

    name: str
    requests: int
    ranks: tuple[int, ...]
    picks: tuple[int, ...]
    resident: int = 64

    def prompts(self, vocab: int) -> list[list[int]]:
        rng = random.Random(0)
        return [
            [rng.randrange(3, vocab) for _ in range(PROMPT_TOKENS)] for _ in range(self.requests)
        ]


def _mixed(count: int) -> tuple[int, ...]:
    return tuple(MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(count))


def _zipf(requests: int, adapters: int) -> tuple[int, ...]:
    weights = [1 / (k + 1) for k in range(adapters)]
    return tuple(random.Random(0).choices(range(adapters), weights, k=requests))


def _registered(adapters: int) -> Workload:
    """64 requests over so many adapters of rank 16, popularity 1/k, adapter memory for 32."""
    return Workload(
        f"registered-{adapters}", 64, (16,) * adapters, _zipf(64, adapters), resident=32
    )


WORKLOADS = {
    w.name: w
    for w in (
        Workload("single-base", 1, (), (-1,)),
        Workload("single-adapter", 1, (16,), (0,)),
        Workload("base-32", 32, (), (-1,) * 32),
        Workload("shared-32", 32, (16,), (0,) * 32),
        Workload("distinct-8", 8, (16,) * 8, tuple(range(8))),
        Workload("distinct-32", 32, (16,) * 32, tuple(range(32))),
        Workload("mixed-rank-32", 32, _mixed(32), tuple(range(32))),
        Workload("zipf-128", 128, _mixed(64), _zipf(128, 64), resident=8),
        Workload("zipf-128-roomy", 128, _mixed(64), _zipf(128, 64)),
        *map(_registered, REGISTERED),
    )
}


def adapter_folders(ranks: Sequence[int], model: Path, directory: Path) -> list[Path]:
    """Adapters of these ranks, made where they are not there yet."""
    folders = [directory / f"r{rank}-{i % CHECKPOINTS}" for i, rank in enumerate(ranks)]
    for i, (rank, folder) in enumerate(zip(ranks, folders, strict=True)):
        if not (folder / "adapter_config.json").exists():
            make_adapter(model, rank, i, folder)
    return folders


def pool_bytes(folders: Sequence[Path], resident: int) -> int:
    """Room for the largest `resident` adapters."""
    sizes = sorted((f / "adapter_model.safetensors").stat().st_size for f in folders)
    return int(sum(sizes[-resident:]) * 1.02) + (1 << 20)


def kv_bytes(model: Path, tokens: int) -> int:
    """The bfloat16 KV cache of so many tokens."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(
        tokens * 2 * config["num_key_value_heads"] * head_dim * 2 * config["num_hidden_layers"]
    )


def make_adapter(model: Path, rank: int, seed: int, directory: Path) -> Path:
    """Writes a random LoRA adapter in peft's format, bf16; small weights, none of them zero."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    sizes = {
        "q_proj": (hidden, heads * head_dim),
        "k_proj": (hidden, kv_heads * head_dim),
        "v_proj": (hidden, kv_heads * head_dim),
        "o_proj": (heads * head_dim, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for part, names in TARGETS.items():
            for name in names:
                into, out = sizes[name]
                key = f"base_model.model.model.layers.{layer}.{part}.{name}"
                for side, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
                    values = torch.randn(shape, generator=generator) * 0.02
                    tensors[f"{key}.{side}.weight"] = values.bfloat16()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name for names in TARGETS.values() for name in names],
        "bias": "none",
        "base_model_name_or_path": model.name,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    return directory
