"""Adapters come, go and fail while others generate."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from manylora_testing import Oracle, tiny_lora, tiny_model
from manylora_testing.engine import House
from manylora_testing.tokenizer import TOKENIZER_VOCAB
from safetensors.torch import load_file, save_file

from manylora.errors import (
    FailedPrecondition,
    ManyloraError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from manylora.server.engine import front
from manylora.server.engine.types import AdapterKey, Residency, ResidencyState

Start = Callable[..., Awaitable[House]]
PROMPT = [9, 8, 7, 70]


def check(oracle: Oracle, adapter: str, tokens: list[int], prompt: list[int] = PROMPT) -> None:
    logits = oracle.logits(adapter or None, [*prompt, *tokens])
    assert tokens == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


async def test_a_slow_load_stops_nobody_else(start: Start, oracle: Oracle) -> None:
    """Others, also on other adapters that load meanwhile, finish while the fetch hangs."""
    house = await start()
    house.fetch.hold("adapter-1")
    slow = asyncio.ensure_future(house.ask(PROMPT, "adapter-1", max_tokens=5, ignore_eos=True))
    await house.fetch.begun("adapter-1")
    for adapter in ("", "adapter-2", "adapter-3", "", "adapter-2"):
        answer = await house.ask(PROMPT, adapter, max_tokens=10, ignore_eos=True)
        check(oracle, adapter, answer.tokens)
    assert not slow.done()
    assert house.engine.stats().waiting == 1
    house.fetch.release("adapter-1")
    check(oracle, "adapter-1", (await slow).tokens)
    await house.check_nothing_is_held()


async def test_many_who_wait_for_one_load_cause_one(start: Start, oracle: Oracle) -> None:
    house = await start()
    house.fetch.hold("adapter-5")
    asked = [
        asyncio.ensure_future(house.ask([i + 3, 70], "adapter-5", max_tokens=3, ignore_eos=True))
        for i in range(6)
    ]
    loading = asyncio.ensure_future(house.load("adapter-5"))
    await house.fetch.begun("adapter-5")
    house.fetch.release("adapter-5")
    for i, answer in enumerate(await asyncio.gather(*asked)):
        check(oracle, "adapter-5", answer.tokens, [i + 3, 70])
    assert (await loading).state is ResidencyState.RESIDENT
    assert house.fetch.fetched == ["adapter-5"]


async def test_a_new_version_beside_the_old(start: Start, oracle: Oracle) -> None:
    """Requests that began on the old one finish on it, though new ones are on the new."""
    house = await start()
    old = house.request(PROMPT, "adapter-1", max_tokens=40, ignore_eos=True)
    stream = house.engine.stream(old)
    tokens = (await anext(stream)).token_ids
    new = await house.ask(PROMPT, "adapter-2", max_tokens=10, ignore_eos=True)
    check(oracle, "adapter-2", new.tokens)
    resident = await house.resident()
    assert set(resident) == {"adapter-1", "adapter-2"}
    async for delta in stream:
        tokens += delta.token_ids
    assert len(tokens) == 40
    check(oracle, "adapter-1", tokens)
    await house.check_nothing_is_held()


async def test_a_failed_load_is_its_own_requests_affair(start: Start, oracle: Oracle) -> None:
    house = await start()
    house.fetch.errors["adapter-1"] = FailedPrecondition("does not fit", field="adapter")
    house.fetch.errors["adapter-2"] = OSError("disk on fire")
    answers = await asyncio.gather(
        *(
            house.ask(PROMPT, f"adapter-{i}" if i else "", max_tokens=8, ignore_eos=True)
            for i in (0, 1, 2, 3, 1, 0)
        ),
        house.load("adapter-1"),
        return_exceptions=True,
    )
    for i in (1, 4, 6):
        assert isinstance(answers[i], FailedPrecondition)
    assert type(answers[2]) is ManyloraError
    assert "disk on fire" in str(answers[2])
    for i, adapter in ((0, ""), (3, "adapter-3"), (5, "")):
        answer = answers[i]
        assert not isinstance(answer, BaseException)
        check(oracle, adapter, answer.tokens)
    outcomes = sorted(record.outcome for record in house.seen.requests)
    assert outcomes == ["error"] * 3 + ["length"] * 3
    house.fetch.errors.clear()
    for adapter in ("adapter-1", "adapter-2"):
        answer = await house.ask(PROMPT, adapter, max_tokens=8, ignore_eos=True)
        check(oracle, adapter, answer.tokens)
    await house.check_nothing_is_held()


async def test_a_checkpoint_of_another_base_is_refused_by_name(
    start: Start, tmp_path: Path
) -> None:
    other = tiny_model("llama", tmp_path / "other", vocab_size=TOKENIZER_VOCAB, hidden_size=64)
    misfit = tiny_lora(other, tmp_path / "misfit", r=2, alpha=4, targets=["q_proj"], seed=1)
    house = await start()
    house.fetch.directories["misfit"] = misfit
    for attempt in (house.ask(PROMPT, "misfit"), house.engine.check_fit(misfit)):
        with pytest.raises(FailedPrecondition) as caught:
            await attempt
        assert "layers.0.self_attn.q_proj.lora_A" in str(caught.value)
        assert "64" in str(caught.value)
        assert "48" in str(caught.value)
    await house.engine.check_fit(house.fetch.directories["adapter-1"])
    await house.check_nothing_is_held()


async def test_logits_that_overflow_end_their_request_only(
    start: Start, oracle: Oracle, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Finite weights, so nothing refuses them at publish; but their products are not."""
    wild = tmp_path / "wild"
    wild.mkdir()
    config = (adapters["adapter-1"] / "adapter_config.json").read_bytes()
    (wild / "adapter_config.json").write_bytes(config)
    weights = load_file(adapters["adapter-1"] / "adapter_model.safetensors")
    huge = {name: torch.full_like(tensor, 1e30) for name, tensor in weights.items()}
    save_file(huge, wild / "adapter_model.safetensors", metadata={"format": "pt"})
    house = await start()
    house.fetch.directories["wild"] = wild
    results = await asyncio.gather(
        house.ask(PROMPT, "", max_tokens=12, ignore_eos=True),
        house.ask(PROMPT, "wild", max_tokens=12, ignore_eos=True),
        house.ask(PROMPT, "adapter-1", max_tokens=12, ignore_eos=True),
        house.ask(PROMPT, "wild", max_tokens=12, temperature=1.0, seed=1, ignore_eos=True),
        return_exceptions=True,
    )
    for i in (1, 3):
        assert isinstance(results[i], FailedPrecondition)
        assert "not finite" in str(results[i])
    for i, adapter in ((0, ""), (2, "adapter-1")):
        result = results[i]
        assert not isinstance(result, BaseException)
        check(oracle, adapter, result.tokens)
    again = await house.ask(PROMPT, "adapter-1", max_tokens=12, ignore_eos=True)
    check(oracle, "adapter-1", again.tokens)
    await house.check_nothing_is_held()


async def test_adapters_that_come_and_go_leave_each_other_alone(
    start: Start, oracle: Oracle
) -> None:
    """Memory for three of them, in any order: gaps are closed while one generates throughout."""
    roomy = await start()
    sizes = [(await roomy.load(digest)).bytes for digest in roomy.fetch.directories]
    house = await start(adapter_bytes=3 * max(sizes))
    steady = asyncio.ensure_future(house.ask(PROMPT, "adapter-7", max_tokens=200, ignore_eos=True))
    rng = random.Random(3)
    for _ in range(30):
        adapter = rng.choice(list(house.fetch.directories))
        answer = await house.ask(PROMPT, adapter, max_tokens=3, ignore_eos=True)
        check(oracle, adapter, answer.tokens)
    check(oracle, "adapter-7", (await steady).tokens)
    await house.check_nothing_is_held()


async def test_pins_and_unloads(start: Start) -> None:
    house = await start(max_adapters=2)
    pinned = await house.load("adapter-1", pin=True)
    assert pinned.pinned
    assert pinned.state is ResidencyState.RESIDENT
    assert pinned.bytes > 0
    for adapter in ("adapter-2", "adapter-3"):
        await house.ask(PROMPT, adapter, max_tokens=2)
    assert set(await house.resident()) == {"adapter-1", "adapter-3"}
    await house.load("adapter-3", pin=True)
    with pytest.raises(ResourceExhausted):
        await house.ask(PROMPT, "adapter-2", max_tokens=2)
    with pytest.raises(ResourceExhausted):
        await house.load("adapter-2")
    await house.ask(PROMPT, "adapter-1", max_tokens=2)
    assert not (await house.load("adapter-1", pin=False)).pinned
    await house.ask(PROMPT, "adapter-2", max_tokens=2)
    assert set(await house.resident()) == {"adapter-2", "adapter-3"}
    with pytest.raises(NotFound):
        await house.unload("adapter-1")
    stream = house.engine.stream(
        house.request(PROMPT, "adapter-2", max_tokens=200, ignore_eos=True)
    )
    await anext(stream)
    with pytest.raises(FailedPrecondition, match="in use"):
        await house.unload("adapter-2")
    await stream.aclose()
    await house.unload("adapter-2")
    await house.check_nothing_is_held()


async def test_versions_of_the_same_bytes_are_resident_each(start: Start, oracle: Oracle) -> None:
    """What is done with one happens to no other; the prefix cache serves both."""
    house = await start()
    mine, yours = (AdapterKey("adapter-1", f"{owner}/a@1") for owner in ("mine", "yours"))
    assert (await house.engine.load_adapter(mine, pin=True)).pinned
    assert not (await house.engine.load_adapter(yours, pin=False)).pinned
    prompt, cached = PROMPT * 5, []
    for key in (mine, yours):
        answer = await house.ask(prompt, key, max_tokens=5, ignore_eos=True)
        check(oracle, "adapter-1", answer.tokens, prompt)
        assert answer.usage is not None
        cached.append(answer.usage.cached_tokens)
    assert cached == [0, 16]
    assert house.fetch.fetched == ["adapter-1"] * 2
    assert [r.pinned for r in await house.engine.residency()] == [True, False]
    await house.engine.unload_adapter(yours)
    with pytest.raises(NotFound, match="yours/a@1"):
        await house.engine.unload_adapter(yours)
    [left] = await house.engine.residency()
    assert left.key == mine and left.pinned
    await house.check_nothing_is_held()


async def test_one_that_is_deleted_before_it_is_fetched(start: Start) -> None:
    house = await start()
    house.fetch.errors["adapter-1"] = NotFound("no such object", field="digest")
    with pytest.raises(NotFound) as caught:
        await house.ask(PROMPT, "adapter-1", max_tokens=5)
    assert (caught.value.field, caught.value.found) == ("adapter", "tenant/adapter-1@1")
    await house.check_nothing_is_held()


async def test_callers_who_give_up_on_a_load(start: Start, oracle: Oracle) -> None:
    house = await start()
    house.fetch.hold("adapter-1")
    calls = [
        asyncio.ensure_future(house.load("adapter-1", pin=True)),
        asyncio.ensure_future(house.load("adapter-1")),
    ]
    await house.fetch.begun("adapter-1")
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    house.fetch.release("adapter-1")
    answer = await house.ask(PROMPT, "adapter-1", max_tokens=5, ignore_eos=True)
    check(oracle, "adapter-1", answer.tokens)


async def test_watching(start: Start) -> None:
    """What is there, then every change."""
    house = await start(max_adapters=1)
    await house.load("adapter-1")
    watch = house.engine.watch()

    async def see() -> tuple[str, ResidencyState]:
        event: Residency = await asyncio.wait_for(anext(watch), 60)
        return event.key.digest, event.state

    assert await see() == ("adapter-1", ResidencyState.RESIDENT)
    await house.ask(PROMPT, "adapter-2", max_tokens=1)
    house.fetch.errors["adapter-3"] = FailedPrecondition("broken")
    with pytest.raises(FailedPrecondition):
        await house.load("adapter-3")
    assert [await see() for _ in range(5)] == [
        ("adapter-2", ResidencyState.LOADING),
        ("adapter-1", ResidencyState.EVICTED),
        ("adapter-2", ResidencyState.RESIDENT),
        ("adapter-3", ResidencyState.LOADING),
        ("adapter-3", ResidencyState.FAILED),
    ]
    await watch.aclose()


async def test_stopping_during_a_load(start: Start) -> None:
    house = await start()
    house.fetch.hold("adapter-1")
    call = asyncio.ensure_future(house.load("adapter-1"))
    request = asyncio.ensure_future(house.ask(PROMPT, "adapter-1"))
    await house.fetch.begun("adapter-1")
    await house.engine.stop()
    for waiting in (call, request):
        with pytest.raises(Unavailable):
            await waiting


async def test_a_watcher_is_told_nothing_older_than_what_it_saw_first(start: Start) -> None:
    house = await start()
    for adapter in ("adapter-1", "adapter-2", "adapter-3"):
        house.fetch.hold(adapter)
        loading = asyncio.ensure_future(house.load(adapter))
        await asyncio.sleep(0)  # the message is on its way, the event is not
        watch = house.engine.watch()
        seen: list[ResidencyState] = []
        async for event in watch:
            if event.key.digest != adapter:
                continue
            if not seen:
                house.fetch.release(adapter)
            seen.append(event.state)
            if event.state is ResidencyState.RESIDENT:
                break
        assert seen == [ResidencyState.LOADING, ResidencyState.RESIDENT]
        await watch.aclose()
        await loading


async def test_watchers_that_leave_are_forgotten(start: Start) -> None:
    house = await start()
    early = asyncio.ensure_future(anext(house.engine.watch()))
    await asyncio.sleep(0)
    early.cancel()
    await asyncio.wait([early])
    watch = house.engine.watch()
    await house.load("adapter-1")
    await anext(watch)
    await watch.aclose()
    await house.settled()
    assert not house.engine._watchers


async def test_a_watcher_who_does_not_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for it has a bound; then it is told, and the others are not."""
    monkeypatch.setattr(front, "MAX_UNREAD", 4)
    house = await start()
    await house.load("adapter-1")
    idle, reader = house.engine.watch(), house.engine.watch()
    for watch in (idle, reader):
        assert (await anext(watch)).state is ResidencyState.RESIDENT
    reading = asyncio.ensure_future(anext(reader))
    for pin in (True, False) * 4:
        await house.load("adapter-1", pin=pin)
        assert (await asyncio.wait_for(reading, 60)).pinned is pin
        reading = asyncio.ensure_future(anext(reader))
    with pytest.raises(ResourceExhausted, match="reads too slowly"):
        _ = [event async for event in idle]
    reading.cancel()
    await asyncio.wait([reading])
    assert not house.engine._watchers
