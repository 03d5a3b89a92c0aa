"""Picks each step's rows: decodes first, then prefill chunks, under one token budget."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from manylora.errors import InvalidArgument, ManyloraError
from manylora.server.engine.blocks import BlockManager
from manylora.server.engine.invocation import acts_from
from manylora.server.engine.prefix import Prefix
from manylora.server.engine.residency import Overtaken, ResidencyManager
from manylora.server.engine.sequence import Gathered, Sequence

MAX_OVERTAKES = 64  # requests with adapters that go before one whose adapter waits for room


@dataclass(slots=True, frozen=True)
class Chunk:
    """The rows of one sequence in one step: tokens [start, start + count)."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that a token is drawn after it."""
        return self._ends and self.sequence.request.pooling is None

    @property
    def ends_pooled(self) -> bool:
        """Whether the chunk completes a request that wants no tokens."""
        return self._ends and self.sequence.request.pooling is not None

    @property
    def _ends(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Waiting and running sequences. Owned by the engine's thread.

    Args:
        max_context: tokens of a sequence, the adapter's own among them.
        write_prefix: copies an adapter's keys and values, of its tokens from the one given on,
            into a sequence's blocks.
        check: why a sequence, whose adapter is resident now, cannot run on it; None if it can.
    """

    def __init__(
        self,
        blocks: BlockManager,
        residency: ResidencyManager,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_context: int,
        write_prefix: Callable[[Prefix, list[int], int], None],
        check: Callable[[Sequence], ManyloraError | None] = lambda _: None,
    ) -> None:
        self._blocks = blocks
        self._residency = residency
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_context = max_context
        self._write_prefix = write_prefix
        self._check = check
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest admission first

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> tuple[list[Chunk], list[tuple[Sequence, ManyloraError]]]:
        """This step's chunks, and the sequences that cannot run (already removed)."""
        chunks: list[Chunk] = []
        budget = self._max_batch_tokens
        decoding = [s for s in self.running if s.computed == len(s.tokens) - 1]
        prefilling = [s for s in self.running if s.computed < len(s.tokens) - 1]
        for sequence in decoding + prefilling:
            if sequence.blocks is None or budget == 0:
                continue  # preempted by an older one just now, or its turn is the next step
            count = _next_rows(sequence, budget)
            if self._make_room(sequence, sequence.computed + count):
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        chunks = [c for c in chunks if c.sequence.blocks is not None]
        failed = self._admit(chunks, budget)
        return chunks, failed

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks and its adapter's slot."""
        if sequence.blocks is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._free(sequence)

    def advance(self, chunk: Chunk) -> None:
        """After the step: the chunk's KV is in the cache."""
        sequence = chunk.sequence
        assert sequence.blocks is not None
        sequence.computed = chunk.start + chunk.count
        self._blocks.register(sequence.blocks, sequence.tokens, sequence.computed)

    def _make_room(self, sequence: Sequence, positions: int) -> bool:
        """Grows the sequence's blocks, preempting the youngest while blocks are short. False if
        it was itself the youngest."""
        assert sequence.blocks is not None
        while not self._blocks.grow(sequence.blocks, positions):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its KV is computed again (mostly out of the prefix
        cache)."""
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def _free(self, sequence: Sequence) -> None:
        assert sequence.blocks is not None
        self._blocks.release(sequence.blocks)
        sequence.blocks = None
        sequence.computed = 0
        if sequence.request.adapter is not None:
            self._residency.release(sequence.request.adapter)
            sequence.slot = -1

    def _admit(self, chunks: list[Chunk], budget: int) -> list[tuple[Sequence, ManyloraError]]:
        """Admits waiting sequences in order, tenants in turns. One whose adapter is not there yet
        is passed over; if it is only room that the adapter lacks, then no more than MAX_OVERTAKES
        times by others with adapters, because they may keep that room taken for ever. So is an
        explicit load, but by whoever comes for the first time."""
        passed: list[Sequence] = []
        take_turns(self.waiting, self.running, self._residency)
        self._residency.want([s.request.adapter for s in self.waiting if s.request.adapter])
        failed = take_failed(self.waiting, self._residency)
        kept_out: list[Overtaken] = self._residency.loads_without_room()
        while self.waiting and budget > 0 and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            if not self._residency.ready(sequence.request.adapter):
                passed.append(self.waiting.popleft())
                if self._residency.lacks_room(sequence.request.adapter):
                    kept_out.append(sequence)
                continue
            rivals = kept_out if sequence.request.adapter and sequence.admitted is None else []
            if any(older.overtaken >= MAX_OVERTAKES for older in rivals):
                passed.append(self.waiting.popleft())
                continue
            if error := self._too_long(sequence) or self._check(sequence):
                failed.append((self.waiting.popleft(), error))
                continue
            if not self._start(sequence):
                break
            self.waiting.popleft()
            for older in rivals:
                older.overtaken += 1
            count = _next_rows(sequence, budget)
            assert sequence.blocks is not None
            self._blocks.grow(sequence.blocks, sequence.computed + count)
            chunks.append(Chunk(sequence, sequence.computed, count))
            budget -= count
        self.waiting.extendleft(reversed(passed))
        return failed

    def _too_long(self, sequence: Sequence) -> InvalidArgument | None:
        """Once its adapter is resident: gives the sequence the adapter's own tokens, which only
        now are known to leave the prompt too little room."""
        sequence.prepend(self._residency.prefix(sequence.request.adapter))
        answer = sequence.request.pooling is None
        if len(sequence.tokens) + answer <= self._max_context:
            return None
        return InvalidArgument(
            "longer than the context leaves room for behind the adapter's own tokens",
            field="prompt",
            found=f"{sequence.prompt_tokens} tokens",
            wanted=f"at most {self._max_context - answer - sequence.prefix_tokens}",
        )

    def _start(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence its blocks and its slot if there is room for all its tokens,
        for one of an answer if it wants any, and one more block for every running sequence."""
        invocation = self._residency.invocation(sequence.request.adapter)
        sequence.acts_from = acts_from(invocation, sequence.request.prompt)
        askable = sequence.tokens[: sequence.askable]
        blocks, cached = self._blocks.start(
            sequence.digest, askable, sequence.prefix_tokens, sequence.acts_from
        )
        wanted = len(sequence.tokens) + (sequence.request.pooling is None)
        need = self._blocks.blocks_for(wanted) - len(blocks.blocks)
        reserve = min(len(self.running), self._blocks.free // 2) if self.running else 0
        if need + reserve > self._blocks.free:
            self._blocks.release(blocks)
            return False
        sequence.blocks = blocks
        sequence.gathered = Gathered()
        sequence.computed = self._behind_prefix(sequence, cached)
        if sequence.admitted is None:
            sequence.admitted = time.monotonic()
            sequence.cached_tokens = max(0, cached - sequence.prefix_tokens)
        if sequence.request.adapter is not None:
            sequence.slot = self._residency.acquire(sequence.request.adapter)
        self.running.append(sequence)
        return True

    def _behind_prefix(self, sequence: Sequence, cached: int) -> int:
        """Puts what the prefix cache lacks of the adapter's own keys and values into the
        sequence's blocks; how many of its leading tokens are in the cache then."""
        prefix, blocks = sequence.prefix, sequence.blocks
        if prefix is None or not prefix.packed.keys_values or cached >= prefix.tokens:
            return cached
        assert blocks is not None
        self._blocks.grow(blocks, prefix.tokens)
        self._write_prefix(prefix, blocks.blocks, cached)
        self._blocks.register(blocks, sequence.tokens, prefix.tokens)
        return prefix.tokens


def _next_rows(sequence: Sequence, budget: int) -> int:
    """How many of its tokens come next. Those before an aLoRA adapter acts come by themselves: what
    the adapter makes of the others cannot break keys and values that the base's requests share."""
    rows = len(sequence.tokens) - sequence.computed
    before = sequence.acts_from - sequence.computed
    return min(budget, rows if before <= 0 else min(rows, before))


def take_turns(
    waiting: deque[Sequence], running: Iterable[Sequence], residency: ResidencyManager
) -> None:
    """Orders the queue so that tenants take turns, first who has the fewest running, each in the
    order of arrival. Before all come those that were preempted, or for whose adapter others must
    make room: whoever is admitted then goes before them, and is counted."""
    if len({sequence.request.tenant for sequence in waiting}) < 2:
        return
    taken = Counter(sequence.request.tenant for sequence in running)
    turns: list[tuple[int, Sequence]] = []
    for sequence in sorted(waiting, key=lambda its: its.arrived):
        first = sequence.admitted is not None or residency.lacks_room(sequence.request.adapter)
        turns.append((-1 if first else taken[sequence.request.tenant], sequence))
        taken[sequence.request.tenant] += 1
    turns.sort(key=lambda turn: turn[0])  # equal turns stay as they are: by arrival
    waiting.clear()
    waiting.extend(sequence for _, sequence in turns)


def take_failed(
    waiting: deque[Sequence], residency: ResidencyManager
) -> list[tuple[Sequence, ManyloraError]]:
    """Takes out the waiting sequences whose adapter could not be loaded."""
    errors = residency.take_failures()
    if not errors:
        return []
    failed = [(s, errors[key]) for s in waiting if (key := s.request.adapter) in errors]
    for sequence, _ in failed:
        waiting.remove(sequence)
    return failed
