"""A running engine for tests: what is asked of it, and what it was seen to do."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import (
    AdapterKey,
    EngineStats,
    FinishReason,
    Pooled,
    PooledTask,
    Pooling,
    Request,
    RequestRecord,
    Residency,
    Rows,
    SamplingParams,
    StepRecord,
    TokenLogprobs,
    Usage,
)

PATIENCE = 60.0  # seconds until a condition that does not come is a failure


def adapter_key(adapter: str | AdapterKey) -> AdapterKey | None:
    """adapter: a digest, "" for the base; a key stays as it is."""
    if isinstance(adapter, AdapterKey):
        return adapter
    return AdapterKey(adapter, f"tenant/{adapter}@1") if adapter else None


@dataclass
class Seen:
    """An observer that keeps everything; `at_step` runs on the engine's thread."""

    steps: list[StepRecord] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    residencies: list[Residency] = field(default_factory=list)
    at_step: Callable[[StepRecord], object] = bool

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)
        self.at_step(record)

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def on_residency(self, event: Residency) -> None:
        self.residencies.append(event)


class Fetch:
    """Adapters' directories by digest; any of them can be held back or made to fail."""

    def __init__(self, directories: dict[str, Path]) -> None:
        self.directories = directories
        self.errors: dict[str, Exception] = {}
        self.fetched: list[str] = []
        self._held: dict[str, threading.Event] = {}
        self._begun: defaultdict[str, threading.Event] = defaultdict(threading.Event)

    def hold(self, digest: str) -> None:
        """Its fetches hang from now on, until `release`."""
        self._held[digest] = threading.Event()

    def release(self, digest: str) -> None:
        self._held.pop(digest).set()

    def release_all(self) -> None:
        for digest in list(self._held):
            self.release(digest)

    async def begun(self, digest: str) -> None:
        """Returns when a loader thread has come for it."""
        assert await asyncio.to_thread(self._begun[digest].wait, PATIENCE)

    def __call__(self, digest: str) -> Path:
        self.fetched.append(digest)
        self._begun[digest].set()
        if gate := self._held.get(digest):
            assert gate.wait(PATIENCE)
        if error := self.errors.get(digest):
            raise error
        return self.directories[digest]


@dataclass
class Answer:
    """All deltas of one stream together."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    deltas: int = 0


class House:
    """An engine with its fetch and its observer."""

    _numbers = itertools.count()

    def __init__(self, settings: EngineSettings, directories: dict[str, Path]) -> None:
        self.fetch = Fetch(directories)
        self.seen = Seen()
        self.engine = AsyncEngine(settings, self.fetch, self.seen)

    def request(
        self,
        prompt: Sequence[int],
        adapter: str | AdapterKey = "",
        *,
        deadline: float | None = None,
        **sampling: Any,
    ) -> Request:
        return Request(
            id=f"request-{next(self._numbers)}",
            prompt=list(prompt),
            sampling=SamplingParams(**sampling),
            adapter=adapter_key(adapter),
            deadline=deadline,
        )

    async def ask(
        self,
        prompt: Sequence[int],
        adapter: str | AdapterKey = "",
        *,
        leave_after: int | None = None,
        deadline: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """The whole answer; or what had come when the stream was closed after some deltas."""
        answer = Answer()
        request = self.request(prompt, adapter, deadline=deadline, **sampling)
        stream = self.engine.stream(request)
        try:
            async for delta in stream:
                assert answer.finish_reason is None, "something came after the end"
                answer.tokens += delta.token_ids
                answer.text += delta.text
                answer.logprobs += delta.logprobs
                answer.finish_reason = delta.finish_reason
                answer.usage = delta.usage
                answer.deltas += 1
                if answer.deltas == leave_after:
                    return answer
        finally:
            await stream.aclose()
        assert answer.finish_reason is not None
        return answer

    async def pool(
        self,
        prompt: Sequence[int],
        adapter: str | AdapterKey,
        task: PooledTask,
        *,
        rows: Rows | None = None,
        normalize: bool = False,
    ) -> Pooled:
        request = self.request(prompt, adapter)
        request.pooling = Pooling(task, rows, normalize)
        return await self.engine.pool(request)

    async def load(self, digest: str, *, pin: bool = False) -> Residency:
        key = adapter_key(digest)
        assert key is not None
        return await self.engine.load_adapter(key, pin=pin)

    async def unload(self, digest: str) -> None:
        key = adapter_key(digest)
        assert key is not None
        await self.engine.unload_adapter(key)

    async def resident(self) -> dict[str, Residency]:
        return {r.key.digest: r for r in await self.engine.residency()}

    async def settled(self) -> EngineStats:
        """The numbers after everything that was sent so far has been seen to."""
        await self.engine.residency()  # its turn has seen all messages before it
        await self.engine.residency()  # and that turn is over
        return self.engine.stats()

    async def check_nothing_is_held(self) -> None:
        """No request, no block, no slot: and what the pool holds is what is resident."""
        stats = await self.settled()
        resident = await self.resident()
        assert (stats.waiting, stats.running) == (0, 0)
        assert stats.blocks_free == stats.blocks_total
        assert [r.in_use for r in resident.values()] == [0] * len(resident)
        for residency in sorted(resident.values(), key=lambda r: not r.key.parts):
            assert residency.error == ""  # a part would take its compositions with it
            await self.engine.unload_adapter(residency.key)
        stats = await self.settled()
        assert (stats.slots_used, stats.pool_bytes_used) == (0, 0)

    async def stop(self) -> None:
        self.fetch.release_all()
        await self.engine.stop()
