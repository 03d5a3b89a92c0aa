"""Picks each step's sequences for an encoder: whole ones, under one token budget.

A sequence is done with the step that it is in, so that nothing outlives a step: no cache, and no
adapter in use between two of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from manylora.errors import InvalidArgument, ManyloraError
from manylora.server.engine.residency import ResidencyManager
from manylora.server.engine.scheduler import Chunk, take_failed, take_turns
from manylora.server.engine.sequence import Gathered, Sequence


class EncoderScheduler:
    """Waiting and running sequences. Owned by the engine's thread; used as `Scheduler` is.

    Args:
        max_batch_tokens: rows in a step; a longer sequence has a step of its own.
        max_context: tokens of a sequence, the adapter's own among them.
        check: see `Scheduler`.
    """

    def __init__(
        self,
        residency: ResidencyManager,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_context: int,
        check: Callable[[Sequence], ManyloraError | None],
    ) -> None:
        self._residency = residency
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_context = max_context
        self._check = check
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> tuple[list[Chunk], list[tuple[Sequence, ManyloraError]]]:
        """This step's sequences, in the order of their arrival but for those whose adapter is not
        there yet; and those that cannot run (already removed)."""
        take_turns(self.waiting, self.running, self._residency)
        self._residency.want([s.request.adapter for s in self.waiting if s.request.adapter])
        failed = take_failed(self.waiting, self._residency)
        chunks: list[Chunk] = []
        passed: list[Sequence] = []
        budget = self._max_batch_tokens
        while self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            if not self._residency.ready(sequence.request.adapter):
                passed.append(self.waiting.popleft())
                continue
            if error := self._too_long(sequence) or self._check(sequence):
                failed.append((self.waiting.popleft(), error))
                continue
            count = len(sequence.tokens)
            if chunks and count > budget:
                break
            self._start(self.waiting.popleft())
            chunks.append(Chunk(sequence, 0, count))
            budget -= count
        self.waiting.extendleft(reversed(passed))
        return chunks, failed

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its adapter's slot."""
        if sequence not in self.running:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        if sequence.request.adapter is not None:
            self._residency.release(sequence.request.adapter)
            sequence.slot = -1

    def advance(self, chunk: Chunk) -> None:
        """After the step."""
        chunk.sequence.computed = chunk.count

    def _start(self, sequence: Sequence) -> None:
        sequence.gathered = Gathered()
        sequence.admitted = time.monotonic()
        if sequence.request.adapter is not None:
            sequence.slot = self._residency.acquire(sequence.request.adapter)
        self.running.append(sequence)

    def _too_long(self, sequence: Sequence) -> InvalidArgument | None:
        """Once its adapter is resident: gives the sequence what the adapter puts before it."""
        prefix = self._residency.prefix(sequence.request.adapter)
        before = 0 if prefix is None else prefix.tokens
        sequence.prepend_rows(prefix)
        if before + sequence.prompt_tokens <= self._max_context:
            return None
        return InvalidArgument(
            "longer than the context has room for behind the adapter's own tokens",
            field="prompt",
            found=f"{sequence.prompt_tokens} tokens",
            wanted=f"at most {self._max_context - before}",
        )
