"""What the engine answers, against transformers + peft, one request at a time."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from manylora_testing import Oracle
from manylora_testing.engine import Answer, House

from manylora.server.engine.types import FinishReason

Start = Callable[..., Awaitable[House]]
LETTER = 70  # a token that is a whole character: no prompt ends within one


def prompts(number: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [*(rng.randrange(3, 290) for _ in range(rng.randrange(longest))), LETTER]
        for _ in range(number)
    ]


def adapter_of(i: int) -> str:
    """Every fourth is a plain base row."""
    return "" if i % 4 == 0 else f"adapter-{i % 20}"


def check_greedy(oracle: Oracle, adapter: str, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the likeliest after those before it: so they are what the oracle says."""
    logits = oracle.logits(adapter or None, [*prompt, *tokens])
    assert tokens == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def text_of(house: House, prompt: list[int], tokens: list[int]) -> str:
    decode = house.engine.tokenizer.decode
    return decode([*prompt, *tokens])[len(decode(prompt)) :]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
async def test_greedy_is_the_oracles(start: Start, oracle: Oracle, kernels: str) -> None:
    """Base rows and adapters of different ranks and targets in one batch; prompts shorter and
    longer than a block and than a step."""
    house = await start(kernels=kernels, max_batch_tokens=24, max_sequences=16)
    lengths = [0, 2, 3, 14, 15, 16, 22, 23, 24, 50, 100]
    asked = [prompts(1, i, 1)[0] for i in range(len(lengths))]
    rng = random.Random(1)
    asked = [[*(rng.randrange(3, 290) for _ in range(n)), LETTER] for n in lengths]
    answers = await asyncio.gather(
        *(house.ask(p, adapter_of(i), max_tokens=8, ignore_eos=True) for i, p in enumerate(asked))
    )
    for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        check_greedy(oracle, adapter_of(i), prompt, answer.tokens)
        assert answer.text == text_of(house, prompt, answer.tokens)
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(answer.tokens) == 8
    await house.check_nothing_is_held()


SAMPLINGS = [
    {},
    {"temperature": 0.8, "top_p": 0.9, "seed": 5},
    {"temperature": 1.5, "top_k": 30, "min_p": 0.01, "seed": 6, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_alone_and_among_31_neighbours(start: Start, sampling: dict[str, float]) -> None:
    house = await start(prefix_cache=False, max_batch_tokens=300)
    asked = prompts(32, seed=3)
    await asyncio.gather(*(house.load(adapter_of(i)) for i in range(20) if i % 4))

    async def ask(i: int) -> Answer:
        return await house.ask(
            asked[i], adapter_of(i), max_tokens=16, ignore_eos=True, logprobs=2, **sampling
        )

    alone = {i: await ask(i) for i in (0, 1, 5, 18, 30)}
    together = await asyncio.gather(*(ask(i) for i in range(32)))
    assert max(step.sequences for step in house.seen.steps) == 32
    for i, answer in alone.items():
        assert together[i].tokens == answer.tokens
        assert together[i].text == answer.text
        for found, wanted in zip(together[i].logprobs, answer.logprobs, strict=True):
            assert found.chosen.logprob == pytest.approx(wanted.chosen.logprob, abs=1e-4)


async def test_logprobs_are_the_oracles(start: Start, oracle: Oracle) -> None:
    house = await start()
    asked = prompts(6, seed=4)
    answers = await asyncio.gather(
        *(
            house.ask(p, adapter_of(i), max_tokens=6, temperature=1.0, seed=i, logprobs=4)
            for i, p in enumerate(asked)
        )
    )
    for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        logits = oracle.logits(adapter_of(i) or None, [*prompt, *answer.tokens])
        wanted = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        assert len(answer.logprobs) == len(answer.tokens)
        for row, token, found in zip(wanted, answer.tokens, answer.logprobs, strict=True):
            assert found.chosen.token_id == token
            assert found.chosen.logprob == pytest.approx(float(row[token]), abs=1e-4)
            values = [top.logprob for top in found.top]
            assert values == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
            assert [float(row[t.token_id]) for t in found.top] == pytest.approx(values, abs=1e-4)


async def test_a_cached_prefix_gives_the_same_answer(start: Start, oracle: Oracle) -> None:
    house = await start()
    prompt = prompts(1, seed=8)[0] * 6
    whole = (len(prompt) - 1) // 16 * 16
    assert whole
    for adapter, cached in (("adapter-1", 0), ("adapter-1", whole), ("adapter-2", 0), ("", 0)):
        answer = await house.ask(prompt, adapter, max_tokens=6, ignore_eos=True)
        assert answer.usage is not None
        assert answer.usage.cached_tokens == cached
        check_greedy(oracle, adapter, prompt, answer.tokens)


async def test_stop_strings_cut_the_text(start: Start) -> None:
    house = await start()
    prompt = prompts(1, seed=11)[0]
    whole = await house.ask(prompt, "adapter-1", max_tokens=60, ignore_eos=True)
    for cut in (slice(0, 1), slice(3, 6), slice(10, 12)):
        stop = whole.text[cut]
        assert stop
        answer = await house.ask(
            prompt, "adapter-1", max_tokens=60, ignore_eos=True, stop=("never comes", stop)
        )
        assert answer.text == whole.text.split(stop, maxsplit=1)[0]
        assert answer.finish_reason is FinishReason.STOP
        assert answer.tokens == whole.tokens[: len(answer.tokens)]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(answer.tokens) < 60
        assert stop in text_of(house, prompt, answer.tokens)
        await house.settled()
        assert house.seen.requests[-1].outcome == "stop"
    await house.check_nothing_is_held()


async def test_a_stop_string_that_only_began_is_text(start: Start) -> None:
    house = await start()
    prompt = prompts(1, seed=11)[0]
    whole = await house.ask(prompt, max_tokens=20, ignore_eos=True)
    end = whole.text.rstrip("\ufffd")[-1]
    answer = await house.ask(prompt, max_tokens=20, ignore_eos=True, stop=(end + "never",))
    assert answer.text == whole.text
    assert answer.finish_reason is FinishReason.LENGTH


async def test_stop_ids_and_end_of_text(start: Start, base: Path, tmp_path: Path) -> None:
    """Both end the answer, are counted, and are no part of its text."""
    prompt = prompts(1, seed=12)[0]
    house = await start()
    whole = await house.ask(prompt, max_tokens=20, ignore_eos=True)
    end = whole.tokens[9]
    tokens = whole.tokens[: whole.tokens.index(end) + 1]
    other = tmp_path / "other-end"
    shutil.copytree(base, other)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(config | {"eos_token_id": [2, end]}))
    for asked, options in (
        (house, {"ignore_eos": True, "stop_token_ids": (250, end)}),
        (await start(model=other), {}),
    ):
        answer = await asked.ask(prompt, max_tokens=20, **options)
        assert answer.tokens == tokens
        assert answer.finish_reason is FinishReason.STOP
        assert answer.text == text_of(house, prompt, tokens[:-1])
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(tokens)
        await asked.check_nothing_is_held()


@pytest.mark.parametrize("blocks", [4, 64])
async def test_the_context_ends_the_answer(start: Start, base: Path, blocks: int) -> None:
    """Whether the model's, the setting's or the cache's: at most so many tokens in all."""
    config = json.loads((base / "config.json").read_text())
    width = config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"]
    block_bytes = 2 * 4 * 16 * width
    house = await start(kv_cache_bytes=blocks * block_bytes, max_context=100)
    context = min(16 * blocks, 100)
    assert house.engine.info.max_context == context
    for length in (1, context - 2, context - 1):
        answer = await house.ask([LETTER] * length, max_tokens=200, ignore_eos=True)
        assert length + len(answer.tokens) == context
        assert answer.finish_reason is FinishReason.LENGTH
    await house.check_nothing_is_held()


async def test_one_seed_one_answer(start: Start) -> None:
    house = await start()
    prompt = prompts(1, seed=13)[0]

    async def ask(seed: int | None) -> list[int]:
        answer = await house.ask(prompt, "adapter-3", temperature=1.5, seed=seed, max_tokens=20)
        return answer.tokens

    first, again, other = await asyncio.gather(ask(1), ask(1), ask(2))
    assert first == again == await ask(1)
    assert first != other
    assert await ask(None) != await ask(None)


async def test_penalties_reach_the_rows_they_belong_to(start: Start) -> None:
    """A strong penalty keeps a request from repeating itself, and its neighbour as it was."""
    house = await start()
    prompt = prompts(1, seed=14)[0]
    plain = await house.ask(prompt, max_tokens=40, ignore_eos=True)
    assert len(set(plain.tokens)) < 40
    kept, again = await asyncio.gather(
        house.ask(prompt, max_tokens=40, ignore_eos=True, repetition_penalty=100.0),
        house.ask(prompt, max_tokens=40, ignore_eos=True),
    )
    assert len(set(kept.tokens) - set(prompt)) > len(set(plain.tokens) - set(prompt))
    assert again.tokens == plain.tokens
