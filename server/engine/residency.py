"""Which adapters are on the device: loading and eviction.

Owned by the engine's thread. Only `_load` runs elsewhere, on loader threads: fetch, check,
lower, pack. What they made is copied into the pool between two steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from manylora.adapters_store.head import Head
from manylora.errors import (
    FailedPrecondition,
    ManyloraError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from manylora.server.engine.mailbox import Loaded, answer, refuse
from manylora.server.engine.packing import PackedAdapter
from manylora.server.engine.placement import Placed, Placement
from manylora.server.engine.prefix import Prefix
from manylora.server.engine.types import AdapterKey, Residency, ResidencyState

logger = logging.getLogger(__name__)

MAX_STAGED = 4  # on the host or on their way there at once, and as many explicit loads


class Overtaken(Protocol):
    """What waits for room in the adapter memory, and how many admissions it has seen since."""

    overtaken: int


class _Stage(Enum):
    QUEUED = "queued"
    LOADING = "loading"
    STAGED = "staged"
    RESIDENT = "resident"
    FAILED = "failed"


_UNDER_WAY = (_Stage.LOADING, _Stage.STAGED)


@dataclass(slots=True)
class _Entry:
    key: AdapterKey
    stage: _Stage = _Stage.QUEUED
    packed: PackedAdapter | None = None  # while staged
    placed: Placed | None = None  # while resident
    users: int = 0
    pinned: bool = False
    leaving: bool = False  # goes as soon as nobody wants it
    last_used: int = 0
    overtaken: int = 0  # requests with adapters, admitted while this waited for room
    load_seconds: float = 0.0
    error: ManyloraError | None = None
    waiters: list[Future[Residency]] = field(default_factory=list)


class ResidencyManager:
    """Loads adapters on demand, evicts the least recently used, never one in use or pinned.

    Args:
        placement: the device's.
        load: makes the packed adapter; runs on a loader thread, raises ManyloraError.
        post: hands a `Loaded` to the engine's thread.
        notify: told of every change, on the engine's thread.
    """

    def __init__(
        self,
        placement: Placement,
        load: Callable[[AdapterKey], PackedAdapter],
        post: Callable[[Loaded], object],
        notify: Callable[[Residency], None],
        *,
        threads: int,
    ) -> None:
        self._placement = placement
        self._load_packed = load
        self._post = post
        self._notify = notify
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="adapter-loader")
        self._entries: dict[AdapterKey, _Entry] = {}
        self._order: dict[AdapterKey, int] = {}  # how early in the queue each is wanted
        self._clock = 0

    # -- for the scheduler ---------------------------------------------------------------------

    def want(self, keys: Iterable[AdapterKey]) -> None:
        """The waiting requests' adapters, the most urgent first: places what has arrived,
        starts loads, forgets what nobody wants."""
        self._order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        for key, entry in list(self._entries.items()):
            entry.waiters = [waiter for waiter in entry.waiters if not waiter.cancelled()]
            if entry.waiters:
                continue
            if entry.stage is _Stage.QUEUED:
                del self._entries[key]  # requests that want it ask for it in their order
            elif entry.leaving and entry.stage is _Stage.RESIDENT:
                if not entry.users and key not in self._order:
                    self._evict(entry)
            elif entry.stage is _Stage.STAGED and key not in self._order:
                del self._entries[key]
                self._notify(Residency(key, ResidencyState.EVICTED))
        self._place_staged()
        self._start_loads()

    def take_failures(self) -> dict[AdapterKey, ManyloraError]:
        """The loads that have failed since the last call. They are forgotten: the next request
        for one of these adapters has it loaded again."""
        failed = {e.key: e.error for e in self._entries.values() if e.error is not None}
        for key in failed:
            del self._entries[key]
        return failed

    def ready(self, key: AdapterKey | None) -> bool:
        """Whether a request may be admitted now."""
        return key is None or self._stage(key) is _Stage.RESIDENT

    def lacks_room(self, key: AdapterKey | None) -> bool:
        """Whether an adapter has been loaded and waits for others to make room."""
        return key is not None and self._stage(key) is _Stage.STAGED

    def loads_without_room(self) -> list[Overtaken]:
        """Explicit loads that wait for others to make room."""
        return [e for e in self._entries.values() if e.stage is _Stage.STAGED and e.waiters]

    def prefix(self, key: AdapterKey | None) -> Prefix | None:
        """What a resident adapter puts before its prompts."""
        return None if key is None else self._placed(key).prefix

    def invocation(self, key: AdapterKey | None) -> tuple[int, ...]:
        """The tokens from which on a resident adapter acts; none: it always does."""
        return () if key is None else self._placed(key).packed.invocation

    def head(self, key: AdapterKey) -> Head | None:
        """A resident adapter's head, as it lies in the pool now."""
        return self._placement.head_of(self._placed(key))

    def acquire(self, key: AdapterKey) -> int:
        """The resident adapter's slot, in use until `release`."""
        entry = self._entries[key]
        entry.users += 1
        self._touch(entry)
        return self._placed(key).slot

    def release(self, key: AdapterKey) -> None:
        entry = self._entries[key]
        entry.users -= 1
        self._touch(entry)

    # -- for the engine ------------------------------------------------------------------------

    def load(self, key: AdapterKey, pin: bool, done: Future[Residency]) -> None:
        """Makes an adapter resident, and pins it (or takes its pin away) as told."""
        entry = self._entries.get(key)
        if entry is None or entry.stage is _Stage.FAILED:
            entry = self._enter(key)
        entry.pinned, entry.leaving = pin, False
        if entry.stage is _Stage.RESIDENT:
            self._touch(entry)
            answer(done, self._describe(entry))
            self._notify(self._describe(entry))
        else:
            entry.waiters.append(done)
            self._start_explicit_loads()

    def unload(self, key: AdapterKey, done: Future[None], *, when_idle: bool = False) -> None:
        """Evicts an adapter that is resident and not in use, and with it the compositions that it
        is part of; one on its way comes without a pin. when_idle: `want` does, and they may be in
        use until then."""
        entries = [e for e in self._entries.values() if e.key.uses(key)]
        if when_idle:
            for entry in entries:
                entry.leaving, entry.pinned = True, False
            answer(done, None)
            return
        if (own := self._entries.get(key)) and own.stage is not _Stage.RESIDENT:
            own.pinned = False
        resident = [entry for entry in entries if entry.stage is _Stage.RESIDENT]
        users = sum(entry.users for entry in resident)
        if not resident:
            refuse(done, NotFound("adapter is not resident", field="name", found=key.label))
        elif users:
            found = f"{users} running requests"
            refuse(done, FailedPrecondition("adapter is in use", field="name", found=found))
        else:
            for entry in resident:
                self._evict(entry)
            answer(done, None)

    def loaded(self, message: Loaded) -> None:
        """A loader thread has finished; `want` places what it made, if anybody wants it still."""
        entry = self._entries[message.key]
        entry.load_seconds = message.seconds
        if isinstance(message.result, ManyloraError):
            self._fail(entry, message.result)
        else:
            entry.packed = message.result
            entry.stage = _Stage.STAGED

    def snapshot(self) -> list[Residency]:
        return [self._describe(entry) for entry in self._entries.values()]

    def close(self) -> None:
        """At the end: no more loads; what those under way make is dropped, and callers still
        waiting get Unavailable."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for entry in self._entries.values():
            for waiter in entry.waiters:
                refuse(waiter, Unavailable("the server is stopping"))
            entry.waiters.clear()

    # -- loading -------------------------------------------------------------------------------

    def _start_loads(self) -> None:
        """In the order of the queue, behind explicit loads."""
        self._start_explicit_loads()
        under_way = [e for e in self._entries.values() if e.stage in _UNDER_WAY]
        room = 2 * MAX_STAGED - len(under_way)
        room = min(room, MAX_STAGED - sum(not entry.waiters for entry in under_way))
        for key in self._order:
            if room <= 0:
                return
            if key not in self._entries:
                self._start(self._enter(key))
                room -= 1

    def _start_explicit_loads(self) -> None:
        """In the order of their calls."""
        explicit = [e for e in self._entries.values() if e.waiters]
        room = MAX_STAGED - sum(entry.stage in _UNDER_WAY for entry in explicit)
        queued = [entry for entry in explicit if entry.stage is _Stage.QUEUED]
        for entry in queued[: max(0, room)]:
            self._start(entry)

    def _start(self, entry: _Entry) -> None:
        entry.stage = _Stage.LOADING
        self._notify(self._describe(entry))
        self._executor.submit(self._load, entry.key)

    def _enter(self, key: AdapterKey) -> _Entry:
        entry = self._entries[key] = _Entry(key)
        return entry

    def _load(self, key: AdapterKey) -> None:
        """On a loader thread."""
        start = time.monotonic()
        result: PackedAdapter | ManyloraError
        try:
            result = self._load_packed(key)
            self._placement.check_fits(result)
        except ManyloraError as error:
            result = error
        except Exception as error:
            logger.exception("loading %s failed", key.label)
            result = ManyloraError(f"loading failed: {type(error).__name__}", found=error)
        self._post(Loaded(key, result, time.monotonic() - start))

    def _fail(self, entry: _Entry, error: ManyloraError) -> None:
        told = {"adapter": entry.key.label, "why": error}
        logger.warning("an adapter was not loaded", extra=told)
        entry.stage, entry.error = _Stage.FAILED, error
        for waiter in entry.waiters:
            refuse(waiter, error)
        entry.waiters.clear()
        self._notify(self._describe(entry))

    # -- placing -------------------------------------------------------------------------------

    def _place_staged(self) -> None:
        """Copies staged adapters into the pool, the most urgent first; one for which there is
        no room keeps what it needs from those behind it."""
        staged = [e for e in self._entries.values() if e.stage is _Stage.STAGED]
        for entry in sorted(staged, key=self._urgency):
            packed = entry.packed
            assert packed is not None
            if self._fully_pinned(packed):
                self._fail(
                    entry,
                    ResourceExhausted(
                        "pinned adapters leave no room in the adapter memory", field="adapter"
                    ),
                )
            elif self._make_space(packed.buffer.numel(), self._urgency(entry)):
                self._place(entry, packed)
            else:
                return

    def _place(self, entry: _Entry, packed: PackedAdapter) -> None:
        entry.placed, entry.packed = self._placement.place(packed), None
        entry.stage = _Stage.RESIDENT
        self._touch(entry)
        described = self._describe(entry)
        for waiter in entry.waiters:
            answer(waiter, described)
        entry.waiters.clear()
        self._notify(described)

    def _make_space(self, size: int, urgency: tuple[int, int]) -> bool:
        """Evicts, the longest unused first, until a slot and `size` elements are free; evicts
        nothing if even all that may go is not enough, and nothing wanted more urgently."""
        free = self._placement.free_size
        slots = self._placement.slots - self._placement.slots_used
        idle = [
            e
            for e in self._entries.values()
            if e.stage is _Stage.RESIDENT
            and not e.users
            and not e.pinned
            and self._urgency(e) > urgency
        ]
        idle.sort(key=lambda e: (-self._urgency(e)[0], e.last_used))
        victims: list[_Entry] = []
        while free < size or slots < 1:
            if len(victims) == len(idle):
                return False
            victim = idle[len(victims)]
            assert victim.placed is not None
            victims.append(victim)
            free += victim.placed.arena.size
            slots += 1
        for victim in victims:
            self._evict(victim)
        return True

    def _fully_pinned(self, packed: PackedAdapter) -> bool:
        pinned = [e.placed.arena.size for e in self._entries.values() if e.pinned and e.placed]
        too_full = sum(pinned) + packed.buffer.numel() > self._placement.size
        return too_full or len(pinned) == self._placement.slots

    def _evict(self, entry: _Entry) -> None:
        assert entry.placed is not None
        self._placement.remove(entry.placed)
        del self._entries[entry.key]
        size = self._placement.bytes_of(entry.placed)
        self._notify(Residency(entry.key, ResidencyState.EVICTED, bytes=size))

    # -- small things --------------------------------------------------------------------------

    def _urgency(self, entry: _Entry) -> tuple[int, int]:
        """Smaller is more urgent: explicit loads, then by place in the queue, then unwanted."""
        if entry.waiters:
            return (-1, 0)
        return (self._order.get(entry.key, len(self._order)), entry.last_used)

    def _placed(self, key: AdapterKey) -> Placed:
        placed = self._entries[key].placed
        assert placed is not None
        return placed

    def _stage(self, key: AdapterKey) -> _Stage | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.stage

    def _touch(self, entry: _Entry) -> None:
        self._clock += 1
        entry.last_used = self._clock

    def _describe(self, entry: _Entry) -> Residency:
        state = {
            _Stage.QUEUED: ResidencyState.LOADING,
            _Stage.LOADING: ResidencyState.LOADING,
            _Stage.STAGED: ResidencyState.LOADING,
            _Stage.RESIDENT: ResidencyState.RESIDENT,
            _Stage.FAILED: ResidencyState.FAILED,
        }[entry.stage]
        return Residency(
            key=entry.key,
            state=state,
            bytes=self._placement.bytes_of(entry.placed),
            pinned=entry.pinned,
            in_use=entry.users,
            load_seconds=entry.load_seconds,
            error="" if entry.error is None else str(entry.error),
        )
