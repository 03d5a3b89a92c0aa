"""The one place where the engine's thread meets the others."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, TypeVar

from manylora.errors import ManyloraError
from manylora.server.engine.packing import PackedAdapter
from manylora.server.engine.types import (
    AdapterKey,
    FinishReason,
    Pooled,
    Request,
    Residency,
    TokenLogprobs,
    Usage,
)

Result = TypeVar("Result")


@dataclass(slots=True, frozen=True)
class Submit:
    request: Request


@dataclass(slots=True, frozen=True)
class Cancel:
    """The caller wants no more of it: it went away, its stop string came (outcome "stop"), or it
    had to give way (outcome "shed")."""

    request_id: str
    outcome: str = "cancelled"


@dataclass(slots=True, frozen=True)
class Load:
    key: AdapterKey
    pin: bool
    done: Future[Residency]


@dataclass(slots=True, frozen=True)
class Unload:
    key: AdapterKey
    done: Future[None]
    when_idle: bool = False


@dataclass(slots=True, frozen=True)
class Inspect:
    done: Future[list[Residency]]


@dataclass(slots=True, frozen=True)
class Loaded:
    """A loader thread's result: the packed adapter, or why not."""

    key: AdapterKey
    result: PackedAdapter | ManyloraError
    seconds: float


@dataclass(slots=True, frozen=True)
class Stop:
    pass


Message = Submit | Cancel | Load | Unload | Inspect | Loaded | Stop


@dataclass(slots=True, frozen=True)
class TokenEvent:
    """One more token of a request; the last has finish_reason."""

    request_id: str
    token: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    usage: Usage


@dataclass(slots=True, frozen=True)
class PooledEvent:
    """A request that wants no tokens is done."""

    request_id: str
    pooled: Pooled


@dataclass(slots=True, frozen=True)
class ErrorEvent:
    """A request ended before its answer was complete."""

    request_id: str
    error: ManyloraError


@dataclass(slots=True, frozen=True)
class ResidencyEvent:
    residency: Residency


@dataclass(slots=True, frozen=True)
class EndEvent:
    """The engine's thread is ending: the last event there is."""


RequestEvent = TokenEvent | PooledEvent | ErrorEvent
Event = RequestEvent | ResidencyEvent | EndEvent


def answer(done: Future[Result], result: Result) -> None:
    """Sets a future's result, unless its caller has given up waiting."""
    if done.set_running_or_notify_cancel():
        done.set_result(result)


def refuse(done: Future[Any], error: ManyloraError) -> None:
    """Sets a future's exception, unless it is done or its caller has given up waiting."""
    if not done.done() and done.set_running_or_notify_cancel():
        done.set_exception(error)


class Mailbox:
    """Messages to the engine's thread; any thread may put."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Message] = SimpleQueue()
        self._lock = Lock()
        self._closed = False

    def put(self, message: Message) -> bool:
        """False if the mailbox is closed: nobody will read the message."""
        with self._lock:
            if not self._closed:
                self._queue.put(message)
            return not self._closed

    def close(self) -> list[Message]:
        """Takes no more messages; returns those that nobody has read."""
        with self._lock:
            self._closed = True
        return self.take(wait=False)

    def take(self, *, wait: bool, seconds: float | None = None) -> list[Message]:
        """All messages there are; waits for the first one, at most `seconds`, if `wait`."""
        messages: list[Message] = []
        try:
            messages.append(self._queue.get(block=wait, timeout=seconds if wait else None))
            while True:
                messages.append(self._queue.get_nowait())
        except Empty:
            return messages
