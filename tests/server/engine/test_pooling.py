"""Classes and embeddings out of the engine equal transformers + peft, beside generation."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from manylora_testing import tiny_model
from manylora_testing.classifiers import make_task_adapter, peft_answer
from manylora_testing.engine import House
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora.errors import InvalidArgument
from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import PooledTask, Rows

TOLERANCE = 1e-4
TASKS = {
    "SEQ_CLS": PooledTask.CLASSIFY,
    "TOKEN_CLS": PooledTask.CLASSIFY_TOKENS,
    "FEATURE_EXTRACTION": PooledTask.EMBED,
}
PROJECTIONS = {
    "gpt2": ["c_attn"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
    "gpt_neox": ["query_key_value"],
}
DECODERS = ("llama", "qwen3", "opt", "opt-350m", "gpt2", "bloom", "falcon", "gpt_neox")


def make_base(arch: str, directory: Path) -> Path:
    tiny_model(arch, directory, vocab_size=TOKENIZER_VOCAB)
    return tiny_tokenizer(directory)


def prompt(seed: int, length: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return [int(i) for i in generator.integers(3, TOKENIZER_VOCAB, length)]


def lora(arch: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=PROJECTIONS.get(arch, ["q_proj", "v_proj"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", DECODERS)
async def test_decoders_equal_peft(arch: str, tmp_path: Path) -> None:
    """All tasks and generation in the same steps; chunks are smaller than the prompts."""
    base = make_base(arch, tmp_path / "base")
    tasks = ["SEQ_CLS", "FEATURE_EXTRACTION"]
    if not arch.startswith("opt"):  # transformers has no class for these
        tasks.append("TOKEN_CLS")
    made = {task: make_task_adapter(base, tmp_path / task, task, lora(arch)) for task in tasks}
    settings = EngineSettings(
        model=base, kv_cache_bytes=4 << 20, adapter_bytes=4 << 20, max_batch_tokens=16
    )
    house = House(settings, made)
    await house.engine.start()
    try:
        prompts = {task: prompt(i, 20 + 9 * i) for i, task in enumerate(tasks)}
        answers = await asyncio.gather(
            house.ask(prompt(9, 30), max_tokens=8, ignore_eos=True),
            *(house.pool(prompts[task], task, TASKS[task], rows=Rows.LAST) for task in tasks),
            house.pool(prompts["FEATURE_EXTRACTION"], "", PooledTask.EMBED, rows=Rows.LAST),
        )
        for task, answer in zip([*tasks, "base"], answers[1:], strict=True):
            name = "FEATURE_EXTRACTION" if task == "base" else task
            right = peft_answer(base, made.get(task), name, prompts[name])
            if name == "FEATURE_EXTRACTION":
                right = right[-1]
            found = torch.from_numpy(answer.values).reshape(right.shape)
            assert float((found - right).abs().max()) < TOLERANCE, task
            assert float(right.abs().max()) > 0.05
        await house.check_nothing_is_held()
    finally:
        await house.stop()


@pytest.mark.filterwarnings("ignore")
async def test_a_prompt_may_fill_the_context(tmp_path: Path) -> None:
    """No token follows it, so that it needs no room for one, nor a block."""
    base = make_base("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"]
    settings = EngineSettings(model=base, kv_cache_bytes=4 * 2 * 4 * 16 * width, adapter_bytes=4096)
    house = House(settings, {})
    await house.engine.start()
    try:
        assert house.engine.info.max_context == 64
        tokens = prompt(1, 64)
        answer = await house.pool(tokens, "", PooledTask.EMBED, rows=Rows.LAST)
        right = peft_answer(base, None, "FEATURE_EXTRACTION", tokens)[-1]
        found = torch.from_numpy(answer.values).reshape(right.shape)
        assert float((found - right).abs().max()) < TOLERANCE
        with pytest.raises(InvalidArgument, match="context"):
            await house.pool([*tokens, 5], "", PooledTask.EMBED, rows=Rows.LAST)
        await house.check_nothing_is_held()
    finally:
        await house.stop()
