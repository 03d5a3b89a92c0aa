"""Which adapters are on the device: loading, slots, eviction.

Owned by the engine's thread. Only `_load` runs elsewhere, on loader threads: fetch, check,
lower, pack. What they made is copied into the pool between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch

from manylora.adapters_store.head import Head
from manylora.errors import (
    FailedPrecondition,
    ManyloraError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from manylora.kernels import EditTable
from manylora.server.engine.mailbox import Loaded, answer, refuse
from manylora.server.engine.model.overrides import Overrides
from manylora.server.engine.packing import PackedAdapter
from manylora.server.engine.pool import Arena, Pool
from manylora.server.engine.prefix import Prefix
from manylora.server.engine.types import AdapterKey, Residency, ResidencyState

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
    packed: PackedAdapter | None = None  # while staged: with its buffer; later without
    arena: Arena | None = None
    slot: int = -1
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
        pool, table: the device's; the table has a row for each slot.
        overrides: written beside the table.
        load: makes the packed adapter; runs on a loader thread, raises ManyloraError.
        post: hands a `Loaded` to the engine's thread.
        notify: told of every change, on the engine's thread.
    """

    def __init__(
        self,
        pool: Pool,
        table: EditTable,
        overrides: Overrides,
        load: Callable[[AdapterKey], PackedAdapter],
        post: Callable[[Loaded], object],
        notify: Callable[[Residency], None],
        *,
        threads: int,
    ) -> None:
        self._pool = pool
        self._table = table
        self._overrides = overrides
        self._load_packed = load
        self._post = post
        self._notify = notify
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="adapter-loader")
        self._entries: dict[str, _Entry] = {}
        self._free_slots = list(range(table.slots - 1, -1, -1))
        self._order: dict[str, int] = {}  # digest → how early in the queue it is wanted
        self._keys: dict[str, AdapterKey] = {}
        self._clock = 0

    # -- for the scheduler ---------------------------------------------------------------------

    def want(self, keys: Iterable[AdapterKey]) -> None:
        """The waiting requests' adapters, the most urgent first: places what has arrived,
        starts loads, forgets what nobody wants."""
        self._keys = {}
        for key in keys:
            self._keys.setdefault(key.digest, key)
        self._order = {digest: i for i, digest in enumerate(self._keys)}
        for digest, entry in list(self._entries.items()):
            entry.waiters = [waiter for waiter in entry.waiters if not waiter.cancelled()]
            if entry.waiters:
                continue
            if entry.stage is _Stage.QUEUED:
                del self._entries[digest]  # requests that want it ask for it in their order
            elif entry.leaving and entry.stage is _Stage.RESIDENT:
                if not entry.users and digest not in self._order:
                    self._evict(entry)
            elif entry.stage is _Stage.STAGED and digest not in self._order:
                del self._entries[digest]
                self._notify(Residency(entry.key, ResidencyState.EVICTED))
        self._place_staged()
        self._start_loads()

    def take_failures(self) -> dict[str, ManyloraError]:
        """The loads that have failed since the last call, by digest. They are forgotten: the
        next request for one of these adapters has it loaded again."""
        failed = {e.key.digest: e.error for e in self._entries.values() if e.error is not None}
        for digest in failed:
            del self._entries[digest]
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
        if key is None:
            return None
        entry = self._entries[key.digest]
        assert entry.packed is not None and entry.arena is not None
        packed = entry.packed.prefix
        return None if packed is None else Prefix(packed, entry.arena)

    def invocation(self, key: AdapterKey | None) -> tuple[int, ...]:
        """The tokens from which on a resident adapter acts; none: it always does."""
        if key is None:
            return ()
        packed = self._entries[key.digest].packed
        assert packed is not None
        return packed.invocation

    def head(self, key: AdapterKey) -> Head | None:
        """A resident adapter's head, as it lies in the pool now."""
        entry = self._entries[key.digest]
        assert entry.packed is not None and entry.arena is not None
        packed = entry.packed.head
        return None if packed is None else packed.view(self._pool.tensor, entry.arena.start)

    def acquire(self, digest: str) -> int:
        """The resident adapter's slot, in use until `release`."""
        entry = self._entries[digest]
        entry.users += 1
        self._touch(entry)
        return entry.slot

    def release(self, digest: str) -> None:
        entry = self._entries[digest]
        entry.users -= 1
        self._touch(entry)

    # -- for the engine ------------------------------------------------------------------------

    def load(self, key: AdapterKey, pin: bool, done: Future[Residency]) -> None:
        """Makes an adapter resident, and pins it (or takes its pin away) as told."""
        entry = self._entries.get(key.digest)
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

    def unload(self, digest: str, done: Future[None], *, when_idle: bool = False) -> None:
        """Evicts an adapter that is resident and not in use, and with it the compositions that it
        is part of; one on its way comes without a pin. when_idle: others go when they may."""
        if when_idle:
            for entry in self._entries.values():
                entry.leaving |= entry.key.uses(digest)
        if (own := self._entries.get(digest)) and own.stage is not _Stage.RESIDENT:
            own.pinned = False
        entries = [e for e in self._entries.values() if e.key.uses(digest)]
        resident = [entry for entry in entries if entry.stage is _Stage.RESIDENT]
        users = sum(entry.users for entry in resident)
        if not resident:
            refuse(done, NotFound("adapter is not resident", field="name", found=digest))
        elif users and when_idle:
            for entry in resident:
                entry.pinned = False
            answer(done, None)
        elif users:
            found = f"{users} running requests"
            refuse(done, FailedPrecondition("adapter is in use", field="name", found=found))
        else:
            for entry in resident:
                self._evict(entry)
            answer(done, None)

    def loaded(self, message: Loaded) -> None:
        """A loader thread has finished; `want` places what it made, if anybody wants it still."""
        entry = self._entries[message.digest]
        entry.load_seconds = message.seconds
        if isinstance(message.result, ManyloraError):
            self._fail(entry, message.result)
        elif error := self._never_fits(message.result):
            self._fail(entry, error)
        else:
            entry.packed = message.result
            entry.stage = _Stage.STAGED

    def snapshot(self) -> list[Residency]:
        return [self._describe(entry) for entry in self._entries.values()]

    @property
    def slots_used(self) -> int:
        return self._table.slots - len(self._free_slots)

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
        for digest, key in self._keys.items():
            if room <= 0:
                return
            if digest not in self._entries:
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
        entry = self._entries[key.digest] = _Entry(key)
        return entry

    def _load(self, key: AdapterKey) -> None:
        """On a loader thread."""
        start = time.monotonic()
        result: PackedAdapter | ManyloraError
        try:
            result = self._load_packed(key)
        except ManyloraError as error:
            result = error
        except Exception as error:
            result = ManyloraError(f"loading failed: {type(error).__name__}", found=error)
        self._post(Loaded(key.digest, result, time.monotonic() - start))

    def _fail(self, entry: _Entry, error: ManyloraError) -> None:
        entry.stage, entry.error = _Stage.FAILED, error
        for waiter in entry.waiters:
            refuse(waiter, error)
        entry.waiters.clear()
        self._notify(self._describe(entry))

    def _never_fits(self, packed: PackedAdapter) -> ManyloraError | None:
        room = self._pool.size * self._pool.tensor.element_size()
        if packed.bytes <= room:
            return None
        return FailedPrecondition(
            "adapter is larger than the adapter memory",
            field="adapter",
            found=f"{packed.bytes} bytes",
            wanted=f"at most {room} bytes",
        )

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
        size = packed.buffer.numel()
        arena = self._pool.allocate(size)
        if arena is None:
            self._compact()
            arena = self._pool.allocate(size)
            assert arena is not None
        self._pool.tensor[arena.start : arena.start + size].copy_(packed.buffer)
        packed.buffer = torch.empty(0, dtype=packed.buffer.dtype)
        entry.arena, entry.slot = arena, self._free_slots.pop()
        entry.stage = _Stage.RESIDENT
        self._write_row(entry)
        self._touch(entry)
        described = self._describe(entry)
        for waiter in entry.waiters:
            answer(waiter, described)
        entry.waiters.clear()
        self._notify(described)

    def _write_row(self, entry: _Entry) -> None:
        assert entry.packed is not None and entry.arena is not None
        packed = entry.packed
        self._table.write(
            entry.slot, packed.rank, packed.scale, packed.offsets_at(entry.arena.start)
        )
        self._overrides.write(entry.slot, packed.overrides, self._pool.tensor, entry.arena.start)

    def _compact(self) -> None:
        self._pool.compact()
        for entry in self._entries.values():
            if entry.stage is _Stage.RESIDENT:
                self._write_row(entry)

    def _make_space(self, size: int, urgency: tuple[int, int]) -> bool:
        """Evicts, the longest unused first, until a slot and `size` elements are free; evicts
        nothing if even all that may go is not enough, and nothing wanted more urgently."""
        free, slots = self._pool.size - self._pool.used, len(self._free_slots)
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
            assert victim.arena is not None
            victims.append(victim)
            free += victim.arena.size
            slots += 1
        for victim in victims:
            self._evict(victim)
        return True

    def _fully_pinned(self, packed: PackedAdapter) -> bool:
        pinned = [e.arena.size for e in self._entries.values() if e.pinned and e.arena is not None]
        too_full = sum(pinned) + packed.buffer.numel() > self._pool.size
        return too_full or len(pinned) == self._table.slots

    def _evict(self, entry: _Entry) -> None:
        assert entry.arena is not None
        self._pool.free(entry.arena)
        self._table.clear(entry.slot)
        self._overrides.clear(entry.slot)
        self._free_slots.append(entry.slot)
        del self._entries[entry.key.digest]
        self._notify(Residency(entry.key, ResidencyState.EVICTED, bytes=self._bytes(entry)))

    # -- small things --------------------------------------------------------------------------

    def _urgency(self, entry: _Entry) -> tuple[int, int]:
        """Smaller is more urgent: explicit loads, then by place in the queue, then unwanted."""
        if entry.waiters:
            return (-1, 0)
        return (self._order.get(entry.key.digest, len(self._order)), entry.last_used)

    def _stage(self, key: AdapterKey) -> _Stage | None:
        entry = self._entries.get(key.digest)
        return None if entry is None else entry.stage

    def _touch(self, entry: _Entry) -> None:
        self._clock += 1
        entry.last_used = self._clock

    def _bytes(self, entry: _Entry) -> int:
        size = entry.arena.size if entry.arena is not None else 0
        return size * self._pool.tensor.element_size()

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
            bytes=self._bytes(entry),
            pinned=entry.pinned,
            in_use=entry.users,
            load_seconds=entry.load_seconds,
            error="" if entry.error is None else str(entry.error),
        )
