"""bfloat16, judged on logits against float32: no worse than peft's own bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from manylora_testing import FlatRunner, Oracle, Stream, tiny_lora, tiny_model
from manylora_testing.models import PACKED
from torch import Tensor

from manylora import kernels
from manylora.server.engine.model import load_model

CPU = torch.device("cpu")

ADAPTERS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "o_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "fc2"],
    "bloom": ["query_key_value", "dense"],
}


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def errors(streams: list[Stream], logits: Callable[[Stream], Tensor], truth: Oracle) -> Tensor:
    """Differences from float32 of every row of every stream."""
    return torch.cat([logits(s) - truth.logits(s.adapter, s.tokens[:-1]) for s in streams])


@pytest.mark.parametrize("arch", ADAPTERS)
def test_bfloat16_is_no_worse_than_pefts(arch: str, tmp_path: Path) -> None:
    base = tiny_model(arch, tmp_path / "base", **(PACKED if arch in ("llama", "gemma2") else {}))
    adapters = {
        name: tiny_lora(base, tmp_path / name, r=r, alpha=alpha, targets=ADAPTERS[arch], seed=r)
        for name, r, alpha in (("small", 4, 4), ("large", 16, 24))
    }
    backend = kernels.select(CPU)
    runner = FlatRunner(load_model(base, "bfloat16", CPU, backend), adapters, backend)
    generator = torch.Generator().manual_seed(0)
    streams = [
        Stream(name, torch.randint(3, 96, (length,), generator=generator).tolist(), watched=True)
        for name in (None, "small", "large")
        for length in (20, 45, 70)
    ]
    runner.run(streams, chunk=24, new_tokens=4)
    truth = Oracle(base, adapters)
    peft = Oracle(base, adapters, torch.bfloat16)
    ours = rms(errors(streams, lambda s: torch.stack([s.rows[p] for p in sorted(s.rows)]), truth))
    theirs = rms(errors(streams, lambda s: peft.logits(s.adapter, s.tokens[:-1]), truth))
    # both are sums of some ten thousand rounding errors, which differ by chance
    assert ours <= 1.05 * theirs
