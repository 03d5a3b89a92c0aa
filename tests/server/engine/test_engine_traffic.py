"""Much at once: everybody's answer is right, and afterwards nothing is held."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest
from manylora_testing import Oracle
from manylora_testing.engine import House

from manylora.server.engine.scheduler import Scheduler
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import FinishReason, ResidencyState

Start = Callable[..., Awaitable[House]]
ELEMENT = 4  # bytes of a float32


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[Sequence]:
    """Who has been preempted."""
    seen: list[Sequence] = []
    preempt = Scheduler._preempt

    def count(self: Scheduler, sequence: Sequence) -> None:
        seen.append(sequence)
        preempt(self, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", count)
    return seen


def block_bytes(house: House) -> int:
    model = house.engine._engine.model
    return sum(2 * heads * 16 * dim * ELEMENT for heads, dim in model.kv_layout)


async def arena_bytes(house: House) -> dict[str, int]:
    """What each adapter takes in the pool."""
    return {d: (await house.load(d)).bytes for d in house.fetch.directories}


async def test_200_requests_over_20_adapters_with_memory_for_4(
    start: Start, oracle: Oracle, preempted: list[Sequence]
) -> None:
    roomy = await start(max_adapters=64)
    sizes = sorted((await arena_bytes(roomy)).values())
    house = await start(
        kv_cache_bytes=12 * block_bytes(roomy),
        adapter_bytes=sum(sizes[-4:]),
        max_adapters=4,
        max_batch_tokens=48,
        max_sequences=12,
    )
    rng = random.Random(20)
    chances = [
        (rng.randrange(3, 290), rng.randrange(1, 10), rng.randrange(1, 40)) for _ in range(200)
    ]
    shared = [rng.randrange(3, 290) for _ in range(36)]  # so that prefixes are found
    asked = [[*shared[: rng.randrange(37)], *[token] * length] for token, length, _ in chances]
    adapters = [rng.choice(["", *house.fetch.directories]) for _ in chances]
    leaves = [rng.choice([None, None, None, None, 0, 1, 2, 20]) for _ in chances]

    async def one(i: int) -> list[int] | None:
        """The answer's tokens; None for one that was cancelled."""
        options = {"max_tokens": chances[i][2], "ignore_eos": True}
        if leaves[i] != 0:
            answer = await house.ask(asked[i], adapters[i], leave_after=leaves[i], **options)
            return answer.tokens if answer.finish_reason is FinishReason.LENGTH else None
        task = asyncio.ensure_future(house.ask(asked[i], adapters[i], **options))
        for _ in range(i % 5):
            await asyncio.sleep(0)  # its place in the loop, not its time
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return (await task).tokens
        return None

    answers = await asyncio.gather(*(one(i) for i in range(200)))
    right = 0
    for prompt, adapter, tokens, (*_, wanted), leave in zip(
        asked, adapters, answers, chances, leaves, strict=True
    ):
        if tokens is None:
            assert leave is not None
            continue
        assert len(tokens) == wanted
        logits = oracle.logits(adapter or None, [*prompt, *tokens])
        assert tokens == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        right += 1
    assert right > 100
    assert len(preempted) > 10
    states = [event.state for event in house.seen.residencies]
    assert states.count(ResidencyState.EVICTED) > 16
    assert max(step.rows for step in house.seen.steps) <= 48
    assert max(step.sequences for step in house.seen.steps) <= 12
    assert max(step.stats.slots_used for step in house.seen.steps) == 4
    await house.check_nothing_is_held()
    never_sent = sum(leave == 0 and i % 5 == 0 for i, leave in enumerate(leaves))
    assert len(house.seen.requests) == 200 - never_sent


async def test_sampled_answers_survive_preemption(start: Start, preempted: list[Sequence]) -> None:
    """With a seed the answer is the same whether its blocks were taken away or not."""
    roomy = await start(prefix_cache=False)
    narrow = await start(kv_cache_bytes=12 * block_bytes(roomy), prefix_cache=False)

    async def run(house: House) -> list[list[int]]:
        answers = await asyncio.gather(
            *(
                house.ask(
                    [i + 3] * (i + 1),
                    f"adapter-{i}",
                    max_tokens=25,
                    ignore_eos=True,
                    temperature=1.0,
                    frequency_penalty=0.5,
                    seed=i,
                )
                for i in range(8)
            )
        )
        return [answer.tokens for answer in answers]

    wanted = await run(roomy)
    assert not preempted
    assert await run(narrow) == wanted
    assert preempted
    await narrow.check_nothing_is_held()


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_a_client_that_vanishes_frees_its_blocks_within_a_step(
    start: Start, how: str
) -> None:
    house = await start(prefix_cache=False)
    request = house.request([5] * 30, "adapter-1", max_tokens=200, ignore_eos=True)
    stream = house.engine.stream(request)
    await anext(stream)
    if how == "close":
        await stream.aclose()
    else:
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    stats = await house.settled()
    assert stats.running == 0
    assert stats.blocks_free == stats.blocks_total
    assert house.seen.requests[-1].outcome == "cancelled"
    assert house.seen.requests[-1].usage.completion_tokens < 200
    await house.check_nothing_is_held()


async def test_priority_of_who_came_first(start: Start) -> None:
    """With one place to run in, answers end in the order of their requests."""
    house = await start(max_sequences=1)
    ended: list[int] = []

    async def one(i: int) -> None:
        await house.ask([i + 3], "", max_tokens=1 + i % 3, ignore_eos=True)
        ended.append(i)

    await asyncio.gather(*(one(i) for i in range(12)))
    assert ended == list(range(12))
