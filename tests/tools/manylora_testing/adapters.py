"""Tiny adapters, made and saved by peft itself, with weights that matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM


def tiny_lora(
    model_dir: Path,
    out_dir: Path,
    *,
    r: int,
    alpha: float,
    targets: Sequence[str] | str,
    seed: int,
    **options: Any,
) -> Path:
    """Makes a LoRA adapter with random A and B (never the zero B of a fresh one), and saves it.

    Args:
        model_dir: the base's checkpoint.
        out_dir: where to; made if absent.
        r, alpha, targets: as in peft's LoraConfig.
        seed: of the weights.
        options: anything else of LoraConfig (use_rslora, rank_pattern, layers_to_transform …).

    Returns:
        out_dir.
    """
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(base, config)
    _randomise(model, seed)
    model.save_pretrained(out_dir)
    return out_dir


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """A ~ N(0, 1/in), B ~ N(0, 0.15 / r): the edit is a fair part of the base's output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        width = parameter.shape[-1]
        std = (0.15 / width) ** 0.5 if "lora_B" in name else width**-0.5
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
