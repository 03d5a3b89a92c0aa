"""Encoder bases: classes and embeddings of mixed batches equal transformers + peft."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from manylora_testing.classifiers import ENCODERS, make_task_adapter, peft_answer, tiny_encoder
from manylora_testing.engine import House
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import PooledTask, Rows

TOLERANCE = 1e-4
ROBERTA = {"targets": ["query", "value", "dense"], "scaled": ["key", "value"], "mlp": []}
PLACES: Mapping[str, Mapping[str, list[str]]] = {
    "bert": ROBERTA,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "modernbert": {"targets": ["Wqkv", "Wo", "dense"], "scaled": ["Wqkv", "Wi"], "mlp": ["Wi"]},
}


TASKS = {
    "SEQ_CLS": (PooledTask.CLASSIFY, None),
    "TOKEN_CLS": (PooledTask.CLASSIFY_TOKENS, None),
    "FEATURE_EXTRACTION": (PooledTask.EMBED, Rows.FIRST),
}


def configs(arch: str) -> dict[tuple[str, str], peft.PeftConfig]:
    """(task, name) → the adapters that ride together."""
    places = PLACES[arch.removesuffix("-mean")]
    targets, scaled, mlp = places["targets"], places["scaled"], places["mlp"]

    def lora(**options: Any) -> peft.LoraConfig:
        return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)

    def p_tuning() -> peft.PromptEncoderConfig:
        return peft.PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=24)

    def prefix() -> peft.PrefixTuningConfig:
        return peft.PrefixTuningConfig(num_virtual_tokens=5)

    return {
        ("SEQ_CLS", "lora"): lora(),
        ("SEQ_CLS", "dora"): lora(use_dora=True),
        ("SEQ_CLS", "bias"): lora(bias="lora_only"),
        ("SEQ_CLS", "ia3"): peft.IA3Config(target_modules=scaled, feedforward_modules=mlp),
        ("SEQ_CLS", "prompt"): peft.PromptTuningConfig(num_virtual_tokens=3),
        ("SEQ_CLS", "p-tuning"): p_tuning(),
        ("TOKEN_CLS", "p-tuning"): p_tuning(),
        **({} if mlp else {(task, "prefix"): prefix() for task in TASKS}),
        ("FEATURE_EXTRACTION", "p-tuning"): p_tuning(),
        ("TOKEN_CLS", "lora"): lora(),
        ("TOKEN_CLS", "ia3"): peft.IA3Config(target_modules=scaled, feedforward_modules=mlp),
        ("FEATURE_EXTRACTION", "lora"): lora(),
        ("FEATURE_EXTRACTION", "dora"): lora(use_dora=True),
    }


def prompt(seed: int, length: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return [int(i) for i in generator.integers(3, TOKENIZER_VOCAB, length)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ENCODERS)
async def test_encoders_equal_peft(arch: str, tmp_path: Path) -> None:
    """Adapters of all tasks and rows of the base, of lengths from one to more than a window."""
    base = tiny_tokenizer(tiny_encoder(arch, tmp_path / "base"))
    wanted = configs(arch)
    made = {
        f"{task}-{name}": make_task_adapter(base, tmp_path / f"{task}-{name}", task, config)
        for (task, name), config in wanted.items()
    }
    settings = EngineSettings(
        model=base, kv_cache_bytes=0, adapter_bytes=4 << 20, max_batch_tokens=200
    )
    house = House(settings, made)
    await house.engine.start()
    try:
        asked = [
            *(
                (task, f"{task}-{name}", prompt(i, 1 + 37 * i % 112))
                for i, (task, name) in enumerate(wanted)
            ),
            ("FEATURE_EXTRACTION", "", prompt(20, 25)),
        ]
        together = False
        for _ in range(20):  # at first each may come as its adapter does
            house.seen.steps.clear()
            answers = await asyncio.gather(
                *(
                    house.pool(ids, name, TASKS[task][0], rows=TASKS[task][1])
                    for task, name, ids in asked
                )
            )
            together = together or max(step.sequences for step in house.seen.steps) > 2
            if together:
                break
        assert together
        for (task, name, ids), answer in zip(asked, answers, strict=True):
            right = peft_answer(base, made.get(name), task, ids)
            if task == "FEATURE_EXTRACTION":
                right = right[0]
            found = torch.from_numpy(answer.values).reshape(right.shape)
            assert float((found - right).abs().max()) < TOLERANCE, name
            assert float(right.abs().max()) > 0.05
        await house.check_nothing_is_held()
    finally:
        await house.stop()
