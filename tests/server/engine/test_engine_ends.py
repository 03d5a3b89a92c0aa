"""How requests end when they do not end well, and how the engine does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from manylora_testing import Oracle
from manylora_testing.engine import PATIENCE, House

from manylora.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ManyloraError,
    ResourceExhausted,
    Unavailable,
)
from manylora.server.engine.model import AdaptedModel

Start = Callable[..., Awaitable[House]]
PROMPT = [9, 8, 7, 70]


async def test_a_deadline_that_has_passed(start: Start) -> None:
    house = await start()
    with pytest.raises(DeadlineExceeded):
        await house.ask(PROMPT, deadline=time.monotonic() - 1)
    await house.settled()
    assert [record.outcome for record in house.seen.requests] == ["deadline"]
    assert not house.seen.steps
    await house.check_nothing_is_held()


async def test_a_deadline_while_the_adapter_loads(start: Start) -> None:
    """Nothing else happens; the engine wakes by itself."""
    house = await start()
    house.fetch.hold("adapter-1")
    with pytest.raises(DeadlineExceeded):
        await house.ask(PROMPT, "adapter-1", deadline=time.monotonic() + 0.05)
    assert house.engine.stats().waiting == 0 or (await house.settled()).waiting == 0
    house.fetch.release("adapter-1")
    await house.ask(PROMPT, "adapter-1", max_tokens=1)
    await house.check_nothing_is_held()


async def test_a_deadline_in_the_middle(start: Start, oracle: Oracle) -> None:
    """What had come by then has been delivered; the neighbour goes on."""
    house = await start()
    deadline = time.monotonic() + 0.3

    def wait(_: object) -> None:
        """The third step lasts until the deadline."""
        if len(house.seen.steps) == 3:
            while (left := deadline - time.monotonic()) > 0:
                threading.Event().wait(left)

    house.seen.at_step = wait
    neighbour = asyncio.ensure_future(house.ask(PROMPT, max_tokens=20, ignore_eos=True))
    request = house.request(PROMPT, deadline=deadline, max_tokens=100, ignore_eos=True)
    tokens: list[int] = []
    with pytest.raises(DeadlineExceeded):
        async for delta in house.engine.stream(request):
            tokens += delta.token_ids
    answer = await neighbour
    assert len(tokens) <= 3
    assert answer.tokens[: len(tokens)] == tokens
    logits = oracle.logits(None, [*PROMPT, *answer.tokens])
    assert answer.tokens == logits[len(PROMPT) - 1 : -1].argmax(dim=-1).tolist()
    await house.check_nothing_is_held()


async def test_a_full_queue(start: Start) -> None:
    house = await start(max_waiting=2, max_sequences=1)
    house.fetch.hold("adapter-1")
    waiting = [
        asyncio.ensure_future(house.ask(PROMPT, "adapter-1", max_tokens=2)) for _ in range(3)
    ]
    await house.fetch.begun("adapter-1")
    with pytest.raises(ResourceExhausted) as caught:
        await house.ask(PROMPT, "adapter-1")
    assert caught.value.retry_after
    house.fetch.release("adapter-1")
    await asyncio.gather(*waiting)
    await house.ask(PROMPT, max_tokens=1)
    await house.check_nothing_is_held()


async def test_no_tenant_keeps_the_others_out(start: Start) -> None:
    """Of a full queue, the last of the one who has the most gives way."""
    house = await start(max_waiting=2, max_sequences=1)
    house.fetch.hold("adapter-1")
    waiting = [
        asyncio.ensure_future(house.ask(PROMPT, "adapter-1", max_tokens=2)) for _ in range(3)
    ]
    await house.fetch.begun("adapter-1")
    answer = await house.ask(PROMPT, max_tokens=2)
    assert len(answer.tokens) == 2
    with pytest.raises(ResourceExhausted) as caught:
        await waiting.pop()
    assert caught.value.retry_after
    house.fetch.release("adapter-1")
    await asyncio.gather(*waiting)
    assert sorted(record.outcome for record in house.seen.requests) == [*["length"] * 3, "shed"]
    await house.check_nothing_is_held()


async def test_an_answer_that_nobody_reads_takes_no_place(start: Start) -> None:
    house = await start(max_waiting=0, max_sequences=1)
    unread = house.engine.stream(house.request(PROMPT, max_tokens=3, ignore_eos=True))
    await anext(unread)
    while (await house.settled()).running:
        pass
    await house.ask(PROMPT, max_tokens=1)
    await unread.aclose()
    await house.check_nothing_is_held()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [5] * 256}),
        ("prompt.token_ids", {"prompt": [5, 300]}),
        ("prompt.token_ids", {"prompt": [5, -1]}),
        ("prompt.token_ids", {"prompt": [2**70]}),
        ("sampling.temperature", {"temperature": float("nan")}),
        ("sampling.top_p", {"top_p": 0.0}),
        ("sampling.max_tokens", {"max_tokens": 0}),
        ("sampling.stop[0]", {"stop": ("",)}),
        ("sampling.stop_token_ids[0]", {"stop_token_ids": (300,)}),
        ("sampling.logprobs", {"logprobs": 21}),
    ],
)
async def test_requests_that_make_no_sense(
    house: House, field: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await house.ask(**{"prompt": PROMPT, **changes})
    assert caught.value.field == field
    stats = await house.settled()
    assert (stats.waiting, stats.running) == (0, 0)
    assert not house.seen.requests


@pytest.fixture
async def house(start: Start) -> House:
    return await start()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-300, "top_p": 1e-300},
        {"temperature": 100.0, "min_p": 1.0, "top_k": 2**31 - 1},
        {"temperature": 1.0, "repetition_penalty": 100.0, "frequency_penalty": 2.0},
        {"temperature": 1.0, "repetition_penalty": 0.01, "presence_penalty": -2.0, "logprobs": 20},
    ],
)
async def test_absurd_but_allowed_sampling_breaks_nothing(
    house: House, sampling: dict[str, Any]
) -> None:
    plain, absurd = await asyncio.gather(
        house.ask(PROMPT, max_tokens=10, ignore_eos=True),
        house.ask(PROMPT, max_tokens=10, ignore_eos=True, seed=1, **sampling),
    )
    assert len(plain.tokens) == len(absurd.tokens) == 10
    assert plain.tokens == (await house.ask(PROMPT, max_tokens=10, ignore_eos=True)).tokens


async def test_a_request_with_the_id_of_a_running_one(house: House) -> None:
    request = house.request(PROMPT, max_tokens=200, ignore_eos=True)
    stream = house.engine.stream(request)
    await anext(stream)
    with pytest.raises(InvalidArgument) as caught:
        await anext(house.engine.stream(request))
    assert caught.value.field == "id"
    assert (await anext(stream)).token_ids
    await stream.aclose()
    await house.check_nothing_is_held()


async def test_a_step_that_fails_ends_its_own_requests(
    house: House, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = AdaptedModel.forward
    broken = threading.Event()

    def fail_once(*arguments: Any) -> Any:
        if len(house.seen.steps) == 2 and not broken.is_set():
            broken.set()
            raise RuntimeError("out of memory")
        return forward(*arguments)

    monkeypatch.setattr(AdaptedModel, "forward", fail_once)
    results = await asyncio.gather(
        *(house.ask(PROMPT, max_tokens=10, ignore_eos=True) for _ in range(3)),
        return_exceptions=True,
    )
    assert broken.is_set()
    assert {type(result) for result in results} == {ManyloraError}
    answer = await house.ask(PROMPT, max_tokens=10, ignore_eos=True)
    logits = oracle.logits(None, [*PROMPT, *answer.tokens])
    assert answer.tokens == logits[len(PROMPT) - 1 : -1].argmax(dim=-1).tolist()
    await house.check_nothing_is_held()


async def test_draining_waits_for_what_runs(house: House) -> None:
    asked = [asyncio.ensure_future(house.ask(PROMPT, max_tokens=20)) for _ in range(3)]
    await asyncio.sleep(0)
    await house.engine.drain(PATIENCE)
    assert (await house.settled()).running == 0
    await asyncio.gather(*asked)


async def test_draining_gives_up_at_its_limit(start: Start) -> None:
    house = await start()
    house.fetch.hold("adapter-1")
    asked = asyncio.ensure_future(house.ask(PROMPT, "adapter-1", max_tokens=2))
    await house.fetch.begun("adapter-1")
    await house.engine.drain(0.01)
    assert not asked.done()
    house.fetch.release("adapter-1")
    await asked


async def test_stopping_ends_every_stream(house: House) -> None:
    streams = [
        house.engine.stream(house.request(PROMPT, max_tokens=250, ignore_eos=True))
        for _ in range(4)
    ]
    for stream in streams:
        await anext(stream)
    await house.engine.stop()
    for stream in streams:
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass


async def test_whoever_comes_after_the_end_is_told_so(house: House) -> None:
    await house.engine.stop()
    with pytest.raises(Unavailable):
        await house.ask(PROMPT)
    with pytest.raises(Unavailable):
        await house.load("adapter-1")
    with pytest.raises(Unavailable):
        await house.unload("adapter-1")
    with pytest.raises(Unavailable):
        await house.engine.residency()
    await house.engine.drain(PATIENCE)


async def test_an_engine_that_breaks_leaves_nobody_waiting(house: House) -> None:
    """Whatever raises on its thread where nothing should."""
    house.fetch.hold("adapter-1")
    waiting = [
        asyncio.ensure_future(house.load("adapter-1")),
        asyncio.ensure_future(house.ask(PROMPT, "adapter-1")),
    ]
    await house.fetch.begun("adapter-1")

    def fail(_: object) -> None:
        raise RuntimeError("the observer is broken")

    house.seen.at_step = fail
    waiting.append(asyncio.ensure_future(house.ask(PROMPT)))
    for call in waiting:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(call, PATIENCE)
    with pytest.raises(Unavailable):
        await house.ask(PROMPT)
    await asyncio.wait_for(house.engine.failed(), PATIENCE)


async def test_messages_that_a_broken_engine_never_reads(house: House) -> None:
    """They came while its last step ran."""
    stepping, told = threading.Event(), threading.Event()

    def fail(_: object) -> None:
        stepping.set()
        told.wait(PATIENCE)
        raise RuntimeError("the observer is broken")

    house.seen.at_step = fail
    calls = [asyncio.ensure_future(house.ask(PROMPT))]
    assert await asyncio.to_thread(stepping.wait, PATIENCE)
    calls += [
        asyncio.ensure_future(house.ask(PROMPT)),
        asyncio.ensure_future(house.load("adapter-1")),
        asyncio.ensure_future(house.engine.residency()),
        asyncio.ensure_future(house.unload("adapter-1")),
    ]
    await asyncio.sleep(0)  # each has put its message
    told.set()
    for call in calls:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(call, PATIENCE)


async def test_messages_behind_the_one_that_breaks_the_engine(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping, told = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        stepping.set()
        told.wait(PATIENCE)

    def fail(*_: object) -> None:
        raise RuntimeError("nobody foresaw this")

    house.seen.at_step = hold
    monkeypatch.setattr(house.engine._engine._residency, "unload", fail)
    calls = [asyncio.ensure_future(house.ask(PROMPT))]
    assert await asyncio.to_thread(stepping.wait, PATIENCE)
    calls += [
        asyncio.ensure_future(house.unload("adapter-1")),
        asyncio.ensure_future(house.load("adapter-1")),
        asyncio.ensure_future(house.ask(PROMPT)),
    ]
    await asyncio.sleep(0)  # each has put its message
    told.set()
    for call in calls:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(call, PATIENCE)


async def test_what_the_observer_is_told(start: Start) -> None:
    house = await start()
    await house.ask(PROMPT, "adapter-1", max_tokens=5, ignore_eos=True)
    await house.settled()
    [record] = house.seen.requests
    assert record.outcome == "length"
    assert record.adapter is not None
    assert record.adapter.digest == "adapter-1"
    assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (4, 5)
    assert record.queue_seconds >= 0
    assert record.first_token_seconds is not None
    assert record.first_token_seconds >= record.queue_seconds
    assert record.per_token_seconds is not None
    assert [step.rows for step in house.seen.steps] == [4, 1, 1, 1, 1]
    last = house.seen.steps[-1].stats
    assert (last.slots_used, last.running) == (1, 0)
    assert last.blocks_free == last.blocks_total
