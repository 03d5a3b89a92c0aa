"""Which adapters are on the device: loads, eviction, pins, and what lies in the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from manylora_testing.loading import Loading, elements, key

from manylora.errors import (
    FailedPrecondition,
    ManyloraError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from manylora.server.engine.residency import MAX_STAGED
from manylora.server.engine.types import Residency, ResidencyState

Make = Callable[..., Loading]
RANKS = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 3, "f": 4}
BROKEN = FailedPrecondition("broken", field="adapter")


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Loading] = []

    def start(ranks: Mapping[str, int] = RANKS, *, room: int = 3, slots: int = 8) -> Loading:
        made.append(Loading(ranks, room=room, slots=slots))
        return made[-1]

    yield start
    for loading in made:
        loading.close()


def load(loading: Loading, digest: str, *, pin: bool = False) -> Future[Residency]:
    done: Future[Residency] = Future()
    loading.manager.load(key(digest), pin, done)
    return done


def unload(loading: Loading, digest: str) -> Future[None]:
    done: Future[None] = Future()
    loading.manager.unload(key(digest), done)
    return done


def want(loading: Loading, digests: str) -> None:
    loading.manager.want([key(digest) for digest in digests])


def test_a_wanted_adapter_becomes_resident(make: Make) -> None:
    loading = make()
    assert not loading.manager.ready(key("a"))
    assert loading.manager.ready(None)
    want(loading, "a")
    assert not loading.manager.ready(key("a"))
    loading.finish("a")
    want(loading, "a")
    assert loading.manager.ready(key("a"))
    slot = loading.manager.acquire(key("a"))
    loading.check_slot("a", slot)
    [residency] = loading.manager.snapshot()
    assert residency.key == key("a")
    assert residency.bytes == 4 * elements(1)
    assert residency.in_use == 1
    assert not residency.pinned
    assert [e.state for e in loading.events] == [ResidencyState.LOADING, ResidencyState.RESIDENT]


def test_the_least_recently_used_goes_first(make: Make) -> None:
    loading = make()
    loading.make_resident("a", "b", "c")
    loading.manager.acquire(key("a"))
    loading.manager.release(key("a"))
    loading.make_resident("d")
    assert loading.resident == {"a", "d"}
    assert [e.key.digest for e in loading.events if e.state is ResidencyState.EVICTED] == ["b", "c"]


def test_a_load_that_finds_it_there_is_a_use(make: Make) -> None:
    loading = make(dict.fromkeys("abcd", 1))
    loading.make_resident("a", "b", "c")
    assert load(loading, "a").result(0).state is ResidencyState.RESIDENT
    loading.make_resident("d")
    assert loading.resident == {"a", "c", "d"}


def test_slots_run_out_before_memory(make: Make) -> None:
    loading = make(room=100, slots=2)
    loading.make_resident("a", "b", "c")
    assert loading.resident == {"b", "c"}
    assert loading.placement.slots_used == 2


def test_one_in_use_stays_and_is_waited_for(make: Make) -> None:
    loading = make()
    loading.make_resident("a", "b", "c")
    slots = {digest: loading.manager.acquire(key(digest)) for digest in "abc"}
    want(loading, "d")
    loading.finish("d")
    want(loading, "d")
    assert loading.resident == {"a", "b", "c"}
    assert loading.manager.lacks_room(key("d"))
    loading.manager.release(key("b"))
    want(loading, "d")
    assert loading.resident == {"a", "b", "c"}, "evicted one although that was not enough"
    loading.manager.release(key("a"))
    want(loading, "d")
    assert loading.resident == {"c", "d"}
    assert not loading.manager.lacks_room(key("d"))
    loading.check_slot("c", slots["c"])


def test_a_pinned_adapter_stays(make: Make) -> None:
    loading = make()
    loading.make_resident("a", "b", "c")
    assert load(loading, "a", pin=True).result(0).pinned
    loading.make_resident("d")
    assert loading.resident == {"a", "d"}
    assert not load(loading, "a", pin=False).result(0).pinned
    loading.make_resident("e")
    assert loading.resident == {"e"}


def test_pins_that_leave_no_room(make: Make) -> None:
    """Who wants more is told so at once; it does not wait for ever."""
    loading = make()
    loading.make_resident("a", "b", "c")
    for digest in "abc":
        load(loading, digest, pin=True)
    done = load(loading, "d")
    want(loading, "e")
    loading.finish("d")
    loading.finish("e")
    want(loading, "e")
    with pytest.raises(ResourceExhausted):
        done.result(0)
    assert isinstance(loading.manager.take_failures()[key("e")], ResourceExhausted)
    assert loading.resident == {"a", "b", "c"}
    load(loading, "a", pin=False)
    load(loading, "b", pin=False)
    loading.make_resident("d")
    assert loading.resident == {"c", "d"}


def test_pins_that_fill_the_slots(make: Make) -> None:
    loading = make(room=100, slots=2)
    loading.make_resident("a", "b")
    load(loading, "a", pin=True)
    load(loading, "b", pin=True)
    done = load(loading, "c")
    loading.finish("c")
    want(loading, "")
    with pytest.raises(ResourceExhausted):
        done.result(0)


def test_an_adapter_larger_than_the_pool(make: Make) -> None:
    loading = make()
    loading.make_resident("a")
    done = load(loading, "f")
    loading.finish("f")
    with pytest.raises(FailedPrecondition, match="larger than the adapter memory"):
        done.result(0)
    assert loading.resident == {"a"}


def test_a_gap_too_small_is_closed(make: Make) -> None:
    """The others move; what they are stays, also of one that is in use."""
    loading = make(dict.fromkeys("abc", 1) | {"d": 2})
    loading.make_resident("a", "b", "c")
    slot = loading.manager.acquire(key("b"))
    loading.make_resident("d")
    assert loading.resident == {"b", "d"}
    loading.check_slot("b", slot)
    loading.check_slot("d", loading.manager.acquire(key("d")))


def test_a_failed_load_is_told_once_and_tried_again(make: Make) -> None:
    loading = make()
    first, second = load(loading, "a"), load(loading, "a")
    want(loading, "a")
    loading.finish("a", BROKEN)
    for done in (first, second):
        assert done.exception(0) is BROKEN
    assert loading.manager.take_failures() == {key("a"): BROKEN}
    assert loading.manager.take_failures() == {}
    assert loading.events[-1].state is ResidencyState.FAILED
    assert "broken" in loading.events[-1].error
    loading.make_resident("a")


def test_an_unforeseen_exception_is_a_failed_load(make: Make) -> None:
    loading = make({})
    done = load(loading, "missing")
    loading.finish("missing")
    with pytest.raises(ManyloraError, match="KeyError"):
        done.result(0)


def test_a_load_after_a_failed_one_starts_afresh(make: Make) -> None:
    loading = make()
    load(loading, "a")
    loading.finish("a", BROKEN)
    again = load(loading, "a")
    loading.finish("a")
    want(loading, "")
    assert again.result(0).state is ResidencyState.RESIDENT


def test_few_are_loaded_ahead_and_the_first_wanted_first(make: Make) -> None:
    ranks = dict.fromkeys("abcdefgh", 1)
    loading = make(ranks, room=8)
    want(loading, "hgfedcba")
    assert loading.loading == list("hgfe")
    assert len(loading.loading) == MAX_STAGED
    loading.finish("g")
    want(loading, "hgfedcba")
    assert loading.loading == list("hfed")


def test_explicit_loads_do_not_wait_for_requests(make: Make) -> None:
    loading = make(dict.fromkeys("abcdefgh", 1), room=8)
    want(loading, "abcdef")
    done = load(loading, "h")
    assert loading.loading == list("abcdh")
    loading.finish("h")
    want(loading, "abcdef")
    assert done.result(0).state is ResidencyState.RESIDENT


def test_explicit_loads_take_no_more_host_memory_than_requests(make: Make) -> None:
    ranks = dict.fromkeys("abcdefgh", 1)
    loading = make(ranks, room=1)
    loading.make_resident("a")
    loading.manager.acquire(key("a"))
    calls = [load(loading, digest) for digest in "bcdefgh"]
    given_up = load(loading, "h")
    assert loading.loading == list("bcde")
    loading.finish_all()
    want(loading, "")
    assert loading.loading == []
    loading.manager.release(key("a"))
    calls[-1].cancel()
    given_up.cancel()
    want(loading, "")
    assert loading.loading == list("fg")
    loading.finish_all()
    want(loading, "")
    assert [call.result(0).key.digest for call in calls[:-1]] == list("bcdefg")
    assert loading.state("h") is None


def test_an_explicit_load_begins_no_other(make: Make) -> None:
    """Of one that has failed, and that requests wanted in the step before."""
    loading = make()
    want(loading, "d")
    loading.finish("d", BROKEN)
    loading.manager.take_failures()
    load(loading, "e")
    assert loading.loading == ["e"]


def test_what_nobody_wants_any_more_takes_nobodys_place(make: Make) -> None:
    """A request was cancelled while its adapter was on its way."""
    loading = make()
    loading.make_resident("a", "b", "c")
    want(loading, "d")
    want(loading, "")
    loading.finish("d")
    want(loading, "")
    assert loading.resident == {"a", "b", "c"}
    assert loading.state("d") is None
    assert loading.events[-1] == Residency(key("d"), ResidencyState.EVICTED)


def test_one_wanted_sooner_is_not_evicted_for_one_wanted_later(make: Make) -> None:
    loading = make()
    loading.make_resident("a", "b", "c")
    want(loading, "abcd")
    loading.finish("d")
    want(loading, "abcd")
    assert loading.resident == {"a", "b", "c"}
    want(loading, "cda")  # b is wanted by nobody, a later than d
    assert loading.resident == {"c", "d"}
    want(loading, "dca")
    assert loading.resident == {"c", "d"}


def test_the_first_without_room_keeps_it_from_those_behind(make: Make) -> None:
    """Small adapters do not starve a large one."""
    loading = make()
    loading.make_resident("a", "b", "c")
    loading.manager.acquire(key("a"))
    want(loading, "e")
    loading.finish("e")
    extra = dict(RANKS) | {"g": 1}
    loading.ranks = extra
    want(loading, "eg")
    loading.finish("g")
    want(loading, "eg")
    assert loading.resident == {"a", "b", "c"}
    loading.manager.release(key("a"))
    want(loading, "eg")
    assert loading.resident == {"e"}


def test_unload(make: Make) -> None:
    loading = make()
    loading.make_resident("a", "b")
    loading.manager.acquire(key("a"))
    with pytest.raises(FailedPrecondition, match="in use"):
        unload(loading, "a").result(0)
    loading.manager.release(key("a"))
    assert unload(loading, "a").result(0) is None
    with pytest.raises(NotFound):
        unload(loading, "a").result(0)
    with pytest.raises(NotFound):
        unload(loading, "never").result(0)
    load(loading, "c")
    with pytest.raises(NotFound):
        unload(loading, "c").result(0)
    assert loading.resident == {"b"}
    assert loading.pool.used == elements(1)
    assert loading.placement.slots_used == 1


def test_what_is_to_go_goes_once_nobody_wants_it(make: Make) -> None:
    loading = make()
    loading.make_resident("a", "b")
    loading.manager.acquire(key("a"))
    done: Future[None] = Future()
    loading.manager.unload(key("a"), done, when_idle=True)
    assert done.result(0) is None
    want(loading, "")
    assert loading.resident == {"a", "b"}, "a runs"
    loading.manager.release(key("a"))
    want(loading, "a")
    assert loading.resident == {"a", "b"}, "a was preempted"
    want(loading, "")
    assert loading.resident == {"b"}
    load(loading, "c", pin=True)
    late: Future[None] = Future()
    loading.manager.unload(key("c"), late, when_idle=True)
    loading.finish("c")
    want(loading, "")
    want(loading, "")
    assert loading.resident == {"b"}


def test_callers_who_give_up(make: Make) -> None:
    """Their futures are cancelled; that disturbs nothing."""
    loading = make()
    patient, gone, failing = load(loading, "a"), load(loading, "a"), load(loading, "b")
    assert gone.cancel()
    assert failing.cancel()
    loading.finish("b", BROKEN)
    loading.finish("a")
    want(loading, "")
    assert patient.result(0).state is ResidencyState.RESIDENT
    for digest in ("a", "c"):
        late: Future[None] = Future()
        late.cancel()
        loading.manager.unload(key(digest), late)
    assert loading.resident == set()
    load(loading, "a")
    loading.finish("a")
    want(loading, "")
    late_load: Future[Residency] = Future()
    late_load.cancel()
    loading.manager.load(key("a"), False, late_load)
    assert loading.resident == {"a"}


def test_closing_leaves_nobody_waiting(make: Make) -> None:
    loading = make()
    waiting, gone = load(loading, "a"), load(loading, "b")
    gone.cancel()
    loading.close()
    with pytest.raises(Unavailable):
        waiting.result(0)


def test_closing_does_not_wait_for_a_load(make: Make) -> None:
    loading = make()
    load(loading, "a")
    loading.manager.close()
    assert loading.loading == ["a"], "its thread still waits for the test"


class Residencies(RuleBasedStateMachine):
    """Everything at random, with a record of who uses what."""

    digest = st.sampled_from(sorted(RANKS))

    def __init__(self) -> None:
        super().__init__()
        self.loading = Loading(RANKS, room=4, slots=3)
        self.held: dict[str, list[int]] = {}  # digest → slots, as acquired
        self.pinned: set[str] = set()
        self.done: list[Future[Residency]] = []

    @rule(digests=st.lists(digest, max_size=5))
    def want(self, digests: list[str]) -> None:
        want(self.loading, "".join(digests))

    @precondition(lambda self: self.loading.loading)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        digest = data.draw(st.sampled_from(self.loading.loading))
        self.loading.finish(digest, BROKEN if fails else None)

    @rule(digest=digest)
    def use(self, digest: str) -> None:
        if self.loading.manager.ready(key(digest)):
            slot = self.loading.manager.acquire(key(digest))
            self.held.setdefault(digest, []).append(slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.held)))
        self.loading.manager.release(key(digest))
        self.held[digest].pop()
        if not self.held[digest]:
            del self.held[digest]

    @rule(digest=digest, pin=st.booleans(), gives_up=st.booleans())
    def load(self, digest: str, pin: bool, gives_up: bool) -> None:
        self.done.append(load(self.loading, digest, pin=pin))
        if gives_up:
            self.done[-1].cancel()

    @rule(digest=digest)
    def unload(self, digest: str) -> None:
        was = self.loading.state(digest)
        error = unload(self.loading, digest).exception(0)
        if digest in self.held:
            assert isinstance(error, FailedPrecondition)
        elif was is ResidencyState.RESIDENT:
            assert error is None
            self.pinned.discard(digest)
        else:
            assert isinstance(error, NotFound)

    @rule()
    def forget_failures(self) -> None:
        for error in self.loading.manager.take_failures().values():
            assert error is BROKEN or isinstance(error, ResourceExhausted)

    @invariant()
    def what_is_in_use_or_pinned_is_there(self) -> None:
        resident = self.loading.resident
        now_pinned = {
            r.key.digest
            for r in self.loading.manager.snapshot()
            if r.pinned and r.state is ResidencyState.RESIDENT
        }
        gone = {d for d in self.pinned if d not in resident}
        assert not gone, "a pinned adapter was evicted"
        self.pinned = now_pinned
        for digest, slots in self.held.items():
            assert digest in resident
            assert len(set(slots)) == 1
            self.loading.check_slot(digest, slots[0])
        assert len({slots[0] for slots in self.held.values()}) == len(self.held)

    @invariant()
    def the_accounts_are_right(self) -> None:
        resident = self.loading.resident
        assert self.loading.pool.used == sum(elements(RANKS[d]) for d in resident)
        assert self.loading.placement.slots_used == len(resident)
        assert int(self.loading.table.rank.any(dim=1).sum()) == len(resident)
        for residency in self.loading.manager.snapshot():
            assert residency.in_use == len(self.held.get(residency.key.digest, []))

    @invariant()
    def the_events_tell_the_same(self) -> None:
        last = {event.key.digest: event.state for event in self.loading.events}
        told = {d for d, state in last.items() if state is ResidencyState.RESIDENT}
        assert told == self.loading.resident

    def teardown(self) -> None:
        for digest, slots in self.held.items():
            for _ in slots:
                self.loading.manager.release(key(digest))
        for _ in RANKS:  # no more than MAX_STAGED at once
            self.loading.finish_all()
            want(self.loading, "")
        assert all(done.done() for done in self.done), "a load was never answered"
        for digest in self.loading.resident:
            self.loading.check_slot(digest, self.loading.manager.acquire(key(digest)))
        self.loading.close()


TestResidencies = Residencies.TestCase
TestResidencies.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_an_unload_takes_the_pin_from_what_is_on_its_way(make: Make) -> None:
    """Else an adapter that is deleted while it waits for room would then stay for ever."""
    loading = make()
    loading.make_resident("d")
    loading.manager.acquire(key("d"))
    waiting = load(loading, "e", pin=True)
    loading.finish("e")
    want(loading, "")
    with pytest.raises(NotFound):
        unload(loading, "e").result(0)
    loading.manager.release(key("d"))
    want(loading, "")
    assert not waiting.result(0).pinned
    assert unload(loading, "e").result(0) is None


def test_a_load_that_its_caller_gave_up_holds_nobody_up(make: Make) -> None:
    loading = make()
    loading.make_resident("d")
    loading.manager.acquire(key("d"))
    given_up = load(loading, "e", pin=True)
    loading.finish("e")
    want(loading, "a")
    loading.finish("a")
    want(loading, "a")
    assert loading.resident == {"d"}, "the explicit load waits for room and comes first"
    given_up.cancel()
    want(loading, "a")
    assert loading.resident == {"d", "a"}
    assert loading.state("e") is None
