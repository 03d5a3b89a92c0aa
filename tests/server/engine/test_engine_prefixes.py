"""Adapters that put tokens, or keys and values, before every prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing.engine import Answer, House
from manylora_testing.methods import METHODS, make_method, peft_rows
from transformers import AutoModelForCausalLM

from manylora.adapters_store.edits import LoweredAdapter, ModuleKind
from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.kernels import reference
from manylora.server.engine.model import load_model
from manylora.server.engine.prefix import check_prefix
from manylora.server.engine.types import FinishReason

pytestmark = pytest.mark.filterwarnings("ignore")

Start = Callable[..., Awaitable[House]]
OWN = {"prompt": 21, "prefix": 19}  # tokens of each adapter's own
PROMPT = [9, 8, 7, 70]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    auto = AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def before(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two kinds of adapters, made by peft: the numbers of their tokens are those of `OWN`."""
    root = tmp_path_factory.mktemp("before")
    assert {name: METHODS[name].options["num_virtual_tokens"] for name in OWN} == OWN
    return {name: make_method(name, "llama", model, root / name) for name in OWN}


@pytest.fixture
async def house(start: Start, before: dict[str, Path]) -> House:
    """Steps so small that the adapters' own tokens take several, as they do blocks."""
    house = await start(max_batch_tokens=10, max_context=64)
    house.fetch.directories |= before
    return house


def check(model: Any, directory: Path | None, answer: Answer, prompt: list[int] = PROMPT) -> None:
    """Each token is what peft finds likeliest."""
    rows = peft_rows(model, directory, [*prompt, *answer.tokens])
    assert answer.tokens == rows[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


async def test_mixed_batch_is_pefts(
    house: House, model: Any, before: dict[str, Path], adapters: dict[str, Path]
) -> None:
    directories = {**before, "adapter-1": adapters["adapter-1"], "": None}
    names = ["prompt", "prefix", "", "adapter-1", "prefix", "prompt"]
    asked = [[*PROMPT, *range(70, 70 + 3 * i)] for i in range(len(names))]
    answers = await asyncio.gather(
        *(
            house.ask(prompt, name, max_tokens=8, ignore_eos=True)
            for prompt, name in zip(asked, names, strict=True)
        )
    )
    for prompt, name, answer in zip(asked, names, answers, strict=True):
        check(model, directories[name], answer, prompt)
    await house.check_nothing_is_held()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("name", OWN)
async def test_own_tokens_are_shared(
    start: Start, before: dict[str, Path], model: Any, name: str, prefix_cache: bool
) -> None:
    """Sequences take blocks of their own only behind the full ones of the adapter's tokens."""
    house = await start(prefix_cache=prefix_cache)
    house.fetch.directories |= before
    check(model, before[name], await house.ask(PROMPT, name, max_tokens=2, ignore_eos=True))
    asked = [[70 + i, *PROMPT] for i in range(3)]
    house.seen.steps.clear()
    for prompt, answer in zip(
        asked,
        await asyncio.gather(
            *(house.ask(prompt, name, max_tokens=16, ignore_eos=True) for prompt in asked)
        ),
        strict=True,
    ):
        check(model, before[name], answer, prompt)
    shared = OWN[name] // 16
    alone = -(-(OWN[name] + 5 + 16) // 16)
    together = [s.stats for s in house.seen.steps if s.sequences == 3]
    assert together
    used = max(stats.blocks_total - stats.blocks_free for stats in together)
    assert used <= shared + 3 * (alone - shared)
    await house.check_nothing_is_held()


async def test_usage_counts_the_prompt_alone(house: House) -> None:
    for cached in (0, 27):
        answer = await house.ask(PROMPT * 7, "prompt", max_tokens=3, ignore_eos=True)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 28
        assert answer.usage.cached_tokens == cached  # 48 of 49 tokens, 21 of them the adapter's
        assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("name", OWN)
async def test_own_tokens_count_against_the_context(house: House, name: str) -> None:
    room = 64 - OWN[name]
    asked = [70] * room
    with pytest.raises(InvalidArgument, match=f"at most {room - 1}"):
        await house.ask(asked, name, max_tokens=1)
    await house.ask(asked, "", max_tokens=1)
    answer = await house.ask(asked[:-3], name, max_tokens=50, ignore_eos=True)
    assert len(answer.tokens) == 3
    assert answer.finish_reason is FinishReason.LENGTH
    await house.check_nothing_is_held()


@pytest.mark.parametrize("name", OWN)
async def test_penalties_leave_own_tokens_out(
    house: House, name: str, model: Any, before: dict[str, Path]
) -> None:
    answer = await house.ask(PROMPT, name, max_tokens=6, ignore_eos=True, repetition_penalty=1.5)
    rows = peft_rows(model, before[name], [*PROMPT, *answer.tokens])
    for i, token in enumerate(answer.tokens):
        row = rows[len(PROMPT) - 1 + i]
        seen = torch.tensor(sorted({*PROMPT, *answer.tokens[:i]}))
        row[seen] = torch.where(row[seen] > 0, row[seen] / 1.5, row[seen] * 1.5)
        assert token == int(row.argmax())


@pytest.mark.parametrize("name", OWN)
async def test_preempted_and_moved(
    start: Start, before: dict[str, Path], model: Any, name: str
) -> None:
    """So few blocks that sequences are preempted and own tokens are computed or copied again; and
    an arena that lies elsewhere by then."""
    house = await start(kv_cache_bytes=8 * 16 * 2 * 2 * 16 * 2 * 4)
    house.fetch.directories |= before
    assert house.engine.stats().blocks_total == 8
    await house.load("adapter-1")
    await house.load(name)
    await house.unload("adapter-1")
    answers = await asyncio.gather(
        *(house.ask([*PROMPT, 70 + i], name, max_tokens=15, ignore_eos=True) for i in range(5))
    )
    for i, answer in enumerate(answers):
        check(model, before[name], answer, [*PROMPT, 70 + i])
    await house.check_nothing_is_held()


async def test_what_does_not_fit_is_refused(
    start: Start, before: dict[str, Path], tmp_path: Path, model: Any
) -> None:
    house = await start(max_context=22)
    with pytest.raises(FailedPrecondition, match="no room for a prompt"):
        await house.engine.check_fit(before["prompt"])
    await house.engine.check_fit(before["prefix"])
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=40)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(FailedPrecondition, match=r"found \[40\]; wanted \[48\]"):
        await house.engine.check_fit(tmp_path / "narrow")


def test_a_base_whose_embedding_cannot_be_adapted(base: Path) -> None:
    model = load_model(base, "float32", torch.device("cpu"), reference)
    embedded = LoweredAdapter({}, virtual_tokens=torch.zeros(3, model.embedding_width))
    check_prefix(embedded, model, 100)
    others = {n: s for n, s in model.modules.items() if s.kind is not ModuleKind.EMBEDDING}
    with pytest.raises(FailedPrecondition, match="embedding cannot take rows"):
        check_prefix(embedded, replace(model, modules=others), 100)
