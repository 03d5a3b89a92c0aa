"""The matrix's column of an encoder: SEQ_CLS adapters of every method, out of a running engine."""

from __future__ import annotations

import asyncio
import copy
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, RobertaConfig

from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import PooledTask, StepRecord
from manylora_testing.engine import House
from manylora_testing.methods import loaded, make_method, methods_of, multitask_ids
from manylora_testing.models import VOCAB, randomise
from manylora_testing.tokenizer import tiny_tokenizer

ENCODER = "roberta"
LABELS = 5


@dataclass(frozen=True)
class Asked:
    """adapter: None for the base. logits: float32 [labels], what was served."""

    adapter: str | None
    prompt: list[int]
    logits: Tensor


@dataclass(frozen=True)
class EncoderColumn:
    """A classifier of RoBERTa's kind, with an adapter of every method."""

    path: Path
    base: Any
    adapters: Mapping[str, Path]


def make_encoder_column(directory: Path, dtype: torch.dtype = torch.float32) -> EncoderColumn:
    """dtype: of the checkpoint's weights."""
    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        type_vocab_size=1,
        num_labels=LABELS,
        attn_implementation="eager",
    )
    path = directory / "base"
    base = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    randomise(base, zlib.crc32(ENCODER.encode()))
    base.to(dtype).save_pretrained(path)
    base.float()
    tiny_tokenizer(path)
    methods = methods_of(ENCODER)
    made = {m: make_method(m, ENCODER, base, directory / m) for m in methods}
    return EncoderColumn(path, base, made)


async def run_encoder_column(
    column: EncoderColumn, dtype: str = "float32", prompts_each: int = 1
) -> tuple[list[Asked], int]:
    """All methods and rows of the base; and how many sequences the largest step had."""
    settings = EngineSettings(
        model=column.path,
        dtype=dtype,
        kv_cache_bytes=0,
        adapter_bytes=64 << 20,
        max_adapters=len(column.adapters),
        max_batch_tokens=1 << 14,
        max_sequences=1 << 10,
    )
    house = House(settings, dict(column.adapters))
    await house.engine.start()
    try:
        for method in column.adapters:
            await house.load(method)
        generator = torch.Generator().manual_seed(5)
        names = [None, *column.adapters, None] * prompts_each
        prompts = [_prompt(generator, 9 + i % 9) for i in range(len(names))]
        stepped, held = threading.Event(), threading.Event()

        def hold(_: StepRecord) -> None:
            """The engine waits after a first step until all requests are there."""
            stepped.set()
            held.wait()

        house.seen.at_step = hold
        first = asyncio.create_task(house.pool([5], "", PooledTask.CLASSIFY))
        await asyncio.to_thread(stepped.wait)
        rest = [
            asyncio.create_task(house.pool(prompt, name or "", PooledTask.CLASSIFY))
            for name, prompt in zip(names, prompts, strict=True)
        ]
        await asyncio.sleep(0)  # each has handed in its request
        held.set()
        answers = [torch.from_numpy(pooled.values[0]) for pooled in await asyncio.gather(*rest)]
        await first
        asked = [Asked(*each) for each in zip(names, prompts, answers, strict=True)]
        return asked, max(step.sequences for step in house.seen.steps)
    finally:
        await house.stop()


@torch.no_grad()
def encoder_gaps(column: EncoderColumn, asked: list[Asked]) -> Mapping[str, tuple[float, float]]:
    """As `matrix.gaps`."""
    found: dict[str, tuple[float, float]] = {}
    plain = copy.deepcopy(column.base)
    for each in asked:
        ids = torch.tensor([each.prompt])
        model = loaded(column.base, column.adapters.get(each.adapter or ""))
        right = model(ids, **multitask_ids(model)).logits[0]
        gap = float((each.logits - right).abs().max())
        found[each.adapter or "base"] = (gap, float((plain(ids).logits[0] - right).abs().max()))
    return found


@torch.no_grad()
def encoder_errors(column: EncoderColumn, asked: list[Asked]) -> tuple[float, float]:
    """Over all that was asked, root mean square of the served logits' difference to peft's in
    float32; and of peft's own in bfloat16."""
    ours, theirs = [], []
    half = copy.deepcopy(column.base).bfloat16()
    for adapter in {each.adapter for each in asked}:
        path = column.adapters.get(adapter or "")
        exact, rounded = loaded(column.base, path), loaded(half, path)
        for each in asked:
            if each.adapter == adapter:
                ids = torch.tensor([each.prompt])
                right = exact(ids, **multitask_ids(exact)).logits[0]
                ours.append(each.logits - right)
                theirs.append(rounded(ids, **multitask_ids(exact)).logits[0].float() - right)
    error, own = (float(torch.stack(gaps).square().mean().sqrt()) for gaps in (ours, theirs))
    return error, own


def _prompt(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()
