"""The scheduler over real blocks and real residency, with a pretended model: each position's K
and V are the tokens up to there, and the next token follows from all that a row can read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manylora_testing.loading import Loading, key

from manylora.errors import FailedPrecondition, ManyloraError
from manylora.server.engine.blocks import BlockManager
from manylora.server.engine.scheduler import MAX_OVERTAKES, Chunk, Scheduler, take_turns
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import (
    AdapterKey,
    Request,
    Residency,
    ResidencyState,
    SamplingParams,
)

SIZE = 4
RANKS = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3}
BROKEN = FailedPrecondition("broken", field="adapter")


def next_token(digest: str, tokens: Seq[int]) -> int:
    return (sum((i + 1) * t for i, t in enumerate(tokens)) + sum(digest.encode())) % 3


def answer(digest: str, prompt: Seq[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(digest, tokens))
    return tokens[len(prompt) :]


class House:
    """A scheduler with what it needs, and the engine's part of a step."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        budget: int = 16,
        sequences: int = 8,
        room: int = 3,
        slots: int = 8,
        prefix_cache: bool = True,
    ) -> None:
        self.loading = Loading(RANKS, room=room, slots=slots)
        self.blocks = BlockManager(blocks, SIZE, prefix_cache=prefix_cache)
        self.budget, self.sequences = budget, sequences
        self.scheduler = Scheduler(
            self.blocks,
            self.loading.manager,
            max_batch_tokens=budget,
            max_sequences=sequences,
            max_context=blocks * SIZE,
            write_prefix=lambda prefix, blocks, first: None,  # noqa: ARG005
        )
        self.written: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.finished: list[Sequence] = []
        self.failed: list[tuple[Sequence, ManyloraError]] = []
        self.preemptions = 0

    def add(self, digest: str, prompt: Seq[int], count: int, tenant: str = "tenant") -> Sequence:
        adapter = AdapterKey(digest, f"{tenant}/{digest}@1") if digest else None
        request = Request("id", list(prompt), SamplingParams(max_tokens=count), adapter)
        sequence = Sequence.start(request, frozenset())
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Chunk]:
        before = list(self.scheduler.running)
        decoding = [s for s in before if s.computed == len(s.tokens) - 1]
        chunks, failed = self.scheduler.schedule()
        self.failed += failed
        self.preemptions += sum(s not in self.scheduler.running for s in before)
        self.check(chunks, decoding)
        for chunk in chunks:
            self.write(chunk)
        for chunk in chunks:
            self.scheduler.advance(chunk)
            if chunk.samples:
                self.sample(chunk.sequence)
        return chunks

    def check(self, chunks: list[Chunk], decoding: list[Sequence]) -> None:
        running = self.scheduler.running
        assert sum(chunk.count for chunk in chunks) <= self.budget
        assert len(running) <= self.sequences
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        rows = {id(chunk.sequence): chunk.count for chunk in chunks}
        for sequence in decoding:
            assert sequence not in running or id(sequence) in rows, "a decode had to wait"
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence in running
            assert chunk.count > 0
            assert chunk.start == sequence.computed
            assert chunk.start + chunk.count <= len(sequence.tokens)
            assert sequence.blocks is not None
            assert len(sequence.blocks.blocks) * SIZE >= chunk.start + chunk.count
        for sequence in running:
            if sequence.digest:
                self.loading.check_slot(sequence.digest, sequence.slot)
            else:
                assert sequence.slot == -1
        for sequence in self.scheduler.waiting:
            assert sequence.blocks is None
            assert sequence.slot == -1

    def write(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert sequence.blocks is not None
        for position in range(chunk.start, chunk.start + chunk.count):
            block = sequence.blocks.blocks[position // SIZE]
            content = (sequence.digest, tuple(sequence.tokens[: position + 1]))
            self.written[(block, position % SIZE)] = content

    def sample(self, sequence: Sequence) -> None:
        assert sequence.blocks is not None
        for position in range(len(sequence.tokens)):
            place = (sequence.blocks.blocks[position // SIZE], position % SIZE)
            assert self.written[place] == (sequence.digest, tuple(sequence.tokens[: position + 1]))
        sequence.append(next_token(sequence.digest, sequence.tokens), now=0.0)
        if sequence.output_tokens == sequence.request.sampling.max_tokens:
            self.scheduler.remove(sequence)
            self.finished.append(sequence)

    @property
    def idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def run(self, limit: int = 10_000) -> None:
        """Until all is done; every load ends as soon as it has begun."""
        for _ in range(limit):
            if self.idle:
                return
            self.loading.finish_all()
            self.step()
        raise AssertionError("not done in time")

    def check_nothing_is_left(self) -> None:
        assert self.idle
        assert self.blocks.free == self.blocks.total
        for residency in self.loading.manager.snapshot():
            assert residency.in_use == 0
        self.loading.manager.want([])
        assert self.loading.placement.slots_used == len(self.loading.resident)


@dataclass(frozen=True)
class Arrival:
    digest: str
    prompt: list[int]
    count: int
    step: int
    cancelled: int | None  # steps after it came


def arrivals(room: int) -> st.SearchStrategy[list[Arrival]]:
    return st.lists(
        st.builds(
            Arrival,
            st.sampled_from(["", *RANKS]),
            st.lists(st.integers(0, 1), min_size=1, max_size=room - 8),
            st.integers(1, 8),
            st.integers(0, 20),
            st.one_of(st.none(), st.integers(0, 25)),
        ),
        min_size=1,
        max_size=16,
    )


@settings(max_examples=150)
@given(data=st.data())
def test_any_traffic(data: st.DataObject) -> None:
    """Requests come and go, loads end late or fail, blocks and adapter memory are short: each
    request that stays gets its own answer, and at the end nothing is held."""
    blocks = data.draw(st.integers(4, 16), "blocks")
    house = House(
        blocks=blocks,
        budget=data.draw(st.integers(1, 12), "budget"),
        sequences=data.draw(st.integers(1, 6), "sequences"),
        room=data.draw(st.integers(3, 6), "room"),
        slots=data.draw(st.integers(1, 4), "slots"),
        prefix_cache=data.draw(st.booleans(), "prefix cache"),
    )
    coming = data.draw(arrivals(blocks * SIZE), "arrivals")
    broken = data.draw(st.sets(st.sampled_from(sorted(RANKS)), max_size=2), "broken")
    chance = random.Random(data.draw(st.integers(0, 1000), "seed"))
    alive: dict[int, tuple[Sequence, Arrival]] = {}
    work = sum(len(a.prompt) + a.count for a in coming) + len(RANKS)
    step = 0
    try:
        while step <= 20 or not house.idle:
            assert step < 50 + 40 * work, "no end in sight"
            for number, arrival in enumerate(coming):
                if arrival.step == step:
                    made = house.add(arrival.digest, arrival.prompt, arrival.count)
                    alive[number] = (made, arrival)
                if arrival.cancelled is not None and arrival.step + arrival.cancelled == step:
                    sequence, _ = alive[number]
                    if not any(sequence is s for s in [*house.finished, *_first(house.failed)]):
                        house.scheduler.remove(sequence)
                        del alive[number]
            chunks = house.step()
            stuck = not chunks and not house.idle and step > 20
            if house.loading.loading and (stuck or chance.random() < 0.3):
                digest = chance.choice(house.loading.loading)
                house.loading.finish(digest, BROKEN if digest in broken else None)
            step += 1
        for sequence, arrival in alive.values():
            if any(sequence is s for s in _first(house.failed)):
                assert arrival.digest in broken
                continue
            assert arrival.digest not in broken
            wanted = answer(arrival.digest, arrival.prompt, arrival.count)
            assert sequence.tokens == [*arrival.prompt, *wanted]
        house.check_nothing_is_left()
    finally:
        house.loading.close()


def _first(failed: list[tuple[Sequence, ManyloraError]]) -> Iterator[Sequence]:
    return (sequence for sequence, _ in failed)


@pytest.fixture
def houses() -> Iterator[list[House]]:
    made: list[House] = []
    yield made
    for house in made:
        house.loading.close()


def test_a_long_prompt_is_cut_into_chunks_beside_the_decodes(houses: list[House]) -> None:
    house = House(budget=6)
    houses.append(house)
    short = house.add("", [1, 2], 30)
    assert [c.count for c in house.step()] == [2]
    long = house.add("", [1] * 13, 2)
    counts = [{id(c.sequence): c.count for c in house.step()} for _ in range(4)]
    assert [c.get(id(long)) for c in counts] == [5, 5, 3, 1]
    assert [c[id(short)] for c in counts] == [1, 1, 1, 1]


def test_the_first_come_is_the_first_served(houses: list[House]) -> None:
    house = House(sequences=2)
    houses.append(house)
    sequences = [house.add("", [i], 3) for i in range(6)]
    house.run()
    assert house.finished == sequences


def test_tenants_take_turns(houses: list[House]) -> None:
    """One who sends much does not keep others out, nor do they him."""
    house = House(sequences=2)
    houses.append(house)
    many = [house.add("a", [i], 4, "many") for i in range(8)]
    others = [*(house.add("b", [i], 4, "few") for i in range(2)), house.add("", [1], 4)]
    house.run()
    assert [s for s in house.finished if s in many] == many
    places = [house.finished.index(sequence) for sequence in others]
    assert max(places) < house.finished.index(many[4])
    assert house.finished.index(many[0]) < max(places)


def test_turns_go_by_arrival(houses: list[House]) -> None:
    """Whoever comes later goes before one only while its tenant has more running."""
    house = House(sequences=2)
    houses.append(house)
    running, waiting = (house.add("", [i], 12) for i in range(2))
    house.scheduler.running.append(running)
    house.scheduler.waiting.remove(running)
    younger = [house.add("a", [i], 4, f"tenant{i}") for i in range(3)]
    take_turns(house.scheduler.waiting, [running], house.loading.manager)
    assert list(house.scheduler.waiting) == [*younger, waiting]
    take_turns(house.scheduler.waiting, [], house.loading.manager)
    assert list(house.scheduler.waiting) == [waiting, *younger]


def test_preempted_ones_go_on_where_they_were(houses: list[House]) -> None:
    """Six blocks for what needs twelve: the youngest yields, and loses no token."""
    house = House(blocks=6, budget=32, prefix_cache=False)
    houses.append(house)
    prompts = [[i, 1, 0, 2] for i in range(4)]
    sequences = [house.add("", prompt, 8) for prompt in prompts]
    house.run()
    assert house.preemptions > 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.tokens == [*prompt, *answer("", prompt, 8)]
    assert house.finished[0] is sequences[0]
    house.check_nothing_is_left()


def test_a_preempted_one_comes_before_who_came_later(houses: list[House]) -> None:
    house = House(blocks=6, budget=32, sequences=2)
    houses.append(house)
    sequences = [house.add("", [i, 1, 0, 2], 10) for i in range(2)]
    sequences += [house.add("", [1], 1) for _ in range(3)]
    house.run()
    assert house.preemptions > 0
    assert house.finished == sequences


def test_one_passed_over_keeps_its_place(houses: list[House]) -> None:
    house = House(sequences=2)
    houses.append(house)
    long = house.add("", [1], 20)
    loading, *others = (house.add("" if i else "b", [1], 2) for i in range(4))
    house.step()
    assert house.scheduler.running == [long, others[0]]
    house.loading.finish("b")
    house.run()
    assert house.finished == [others[0], loading, *others[1:], long]


def test_a_preempted_ones_adapter_may_go_and_comes_back(houses: list[House]) -> None:
    house = House(blocks=6, budget=32, room=1)
    houses.append(house)
    sequences = [house.add("ab"[i % 2], [i, 1, 0, 2], 8) for i in range(4)]
    house.run()
    assert [s.output_tokens for s in sequences] == [8] * 4
    for sequence in sequences:
        prompt = sequence.request.prompt
        assert sequence.tokens == [*prompt, *answer(sequence.digest, prompt, 8)]
    house.check_nothing_is_left()


def test_the_prefix_cache_saves_the_prompt_once_only_for_its_own_adapter(
    houses: list[House],
) -> None:
    house = House()
    houses.append(house)
    prompt = [1, 2, 0] * 4
    for digest, cached in (("a", 0), ("a", 8), ("b", 0), ("", 0), ("", 8)):
        sequence = house.add(digest, prompt, 2)
        house.run()
        assert sequence.cached_tokens == cached
        assert sequence.usage().cached_tokens == cached


def test_one_whose_adapter_loads_is_passed_over_for_as_long_as_that_takes(
    houses: list[House],
) -> None:
    """A fetch that hangs keeps nobody else from being served."""
    house = House(sequences=4)
    houses.append(house)
    hanging = house.add("c", [1], 1)
    others = [house.add("", [i % 3], 2) for i in range(3 * MAX_OVERTAKES)]
    while len(house.finished) < len(others):
        assert house.step(), "the others wait for the hanging load"
    assert house.loading.loading == ["c"]
    house.run()
    assert house.finished[-1] is hanging


def full_house(houses: list[House], tokens: int) -> House:
    """With room for one adapter, on which a request of so many tokens runs."""
    house = House(sequences=3, room=1)
    houses.append(house)
    house.add("a", [1], tokens)
    house.step()
    house.loading.finish("a")
    house.step()
    return house


def test_one_whose_adapter_lacks_room_is_passed_over_so_often_and_no_more(
    houses: list[House],
) -> None:
    """A never-ending stream on the adapters that fill the memory does not starve it."""
    house = full_house(houses, 20)
    waiting = house.add("b", [1], 1)
    house.step()
    house.loading.finish("b")
    steps = 0
    while waiting.first_token is None:
        while len(house.scheduler.waiting) < 4:
            house.add("a", [steps % 3], 1 + steps % 3)
        house.step()
        steps += 1
        assert steps < 2 * MAX_OVERTAKES + 20
        assert waiting.overtaken <= MAX_OVERTAKES
    assert waiting.overtaken == MAX_OVERTAKES
    house.run()
    house.check_nothing_is_left()


def test_one_whose_adapter_lacks_room_does_not_hold_up_the_base(houses: list[House]) -> None:
    """The base takes none of the room that it waits for; another adapter's request would."""
    house = full_house(houses, 4 * MAX_OVERTAKES)
    waiting = house.add("b", [1], 1)
    house.step()
    house.loading.finish("b")
    while waiting.overtaken < MAX_OVERTAKES:
        house.add("a", [1], 1)
        house.step()
    last = house.add("a", [2], 1)
    base = [house.add("", [i % 3], 1) for i in range(MAX_OVERTAKES + 1)]
    while not all(sequence.output_tokens for sequence in base):
        assert house.step(), "the base waits for an adapter's room"
    assert waiting.overtaken == MAX_OVERTAKES
    assert waiting.first_token is None
    assert last.first_token is None
    house.run()
    assert house.finished.index(waiting) < house.finished.index(last)
    house.check_nothing_is_left()


def test_an_explicit_load_that_lacks_room_is_passed_over_so_often_and_no_more(
    houses: list[House],
) -> None:
    house = full_house(houses, 20)
    done: Future[Residency] = Future()
    house.loading.manager.load(key("b"), False, done)
    house.loading.finish("b")
    admitted = 0
    while not done.done():
        while len(house.scheduler.waiting) < 4:
            house.add("a", [admitted % 3], 1 + admitted % 3)
            admitted += 1
        house.step()
        assert admitted < 2 * MAX_OVERTAKES
    assert admitted > MAX_OVERTAKES
    house.run()
    house.check_nothing_is_left()


def test_a_failed_load_ends_all_who_wait_for_it_though_they_are_many(houses: list[House]) -> None:
    """Even those whose turn is far away, and none who comes later."""
    house = House(sequences=1)
    houses.append(house)
    house.add("", [1], 20)
    doomed = [house.add("a", [1], 1) for _ in range(5)]
    other = house.add("b", [1], 1)
    house.step()
    house.loading.finish("a", BROKEN)
    late = house.add("b", [1], 1)
    house.step()
    assert [s for s, _ in house.failed] == doomed
    assert {error for _, error in house.failed} == {BROKEN}
    again = house.add("a", [1], 1)
    house.run()
    assert len(house.failed) == 5
    assert {id(s) for s in house.finished} >= {id(other), id(late), id(again)}


def test_a_broken_adapter_under_constant_traffic_is_tried_again(houses: list[House]) -> None:
    house = House()
    houses.append(house)
    for attempt in range(3):
        house.add("a", [1], 1)
        house.step()
        house.add("a", [1], 1)  # there is always one waiting
        house.loading.finish("a", BROKEN)
        house.step()
        assert len(house.failed) == 2 * (attempt + 1)
    house.add("a", [1], 1)
    house.run()
    assert len(house.finished) == 1


@pytest.mark.parametrize("when", ["waiting", "loading", "prefilling", "decoding"])
def test_removing_one_frees_what_it_held(houses: list[House], when: str) -> None:
    house = House(budget=4)
    houses.append(house)
    sequence = house.add("a", [1] * 9, 5)
    if when != "waiting":
        house.step()
    if when in ("prefilling", "decoding"):
        house.loading.finish("a")
        house.step()
    if when == "decoding":
        house.step()
        house.step()
        assert sequence.output_tokens == 1
    house.scheduler.remove(sequence)
    house.loading.finish_all()
    house.step()
    house.check_nothing_is_left()


def test_an_adapter_in_use_is_not_unloaded_under_its_requests(houses: list[House]) -> None:
    house = House()
    houses.append(house)
    house.add("a", [1], 4)
    house.step()
    house.loading.finish("a")
    house.step()
    [residency] = house.loading.manager.snapshot()
    assert residency.state is ResidencyState.RESIDENT
    assert residency.in_use == 1
    house.run()
    [residency] = house.loading.manager.snapshot()
    assert residency.in_use == 0
