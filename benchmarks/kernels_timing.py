"""Medians of calls taken in turns, and memory that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from manylora import kernels

DTYPE = torch.bfloat16
RING_BYTES = 1 << 30
READ_BYTES = 8 << 20

Call = Callable[[int], object]
"""Given the turn's number, so that turns can differ in what they read."""


class Ring:
    """Random numbers in huge pages, handed out piece by piece from end to end, then from the start
    again: by the time that a piece is handed out once more, no cache has it.

    values: bfloat16, flat.
    """

    def __init__(self, size: int = RING_BYTES) -> None:
        self.values = kernels.empty([size // DTYPE.itemsize], DTYPE, torch.device("cpu"))
        self._next = 0
        self.fill()

    def fill(self) -> None:
        """Random numbers everywhere, also where something else has been written."""
        some = torch.randn(min(1 << 20, len(self.values)), generator=torch.Generator())
        for part in self.values.split(len(some)):
            part.copy_(some[: len(part)] / 32)

    def take(self, numel: int) -> int:
        """Where a piece of so many elements begins; pieces begin on cache lines."""
        if self._next + numel > len(self.values):
            self._next = 0
        start = self._next
        self._next += _whole_lines(numel)
        return start

    def walk(self, numel: int, most: int) -> list[int]:
        """Where each of as many pieces as fit, at most so many, begins; none lies in another."""
        count = min(most, self.fits(numel))
        if self._next + count * _whole_lines(numel) > len(self.values):
            self._next = 0
        return [self.take(numel) for _ in range(count)]

    def fits(self, numel: int) -> int:
        """How many pieces of so many elements one walk hands out."""
        return len(self.values) // _whole_lines(numel)

    def reader(self) -> Call:
        """Reads READ_BYTES a call, as fast as torch's threads can."""
        numel = READ_BYTES // DTYPE.itemsize
        blocks = [part.view(torch.float32) for part in self.values.split(numel)]
        return lambda turn: blocks[turn % len(blocks)].sum()


def _whole_lines(numel: int) -> int:
    return -(-numel // 32) * 32


def settle(read: Call, patience: float = 10.0) -> None:
    """Reads until reads take about the same time: the system goes on clearing and joining pages for
    seconds after a program has asked for many."""
    times: list[float] = []
    end = time.perf_counter() + patience
    while time.perf_counter() < end:
        start = time.perf_counter()
        read(len(times))
        times.append(time.perf_counter() - start)
        if len(times) >= 64 and sorted(times[-64:])[60] < 2 * min(times):
            return


def medians(calls: Sequence[Call], budget: float, most: int = 1 << 20) -> list[float]:
    """Seconds of each call, in turns of a few, since a machine's speed drifts. At least five of
    each, then until `budget` seconds have passed or each had `most`."""
    for call in calls:
        call(0)
    times: list[list[float]] = [[] for _ in calls]
    end, turn = time.perf_counter() + budget, 0
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < most):
        for call, found in zip(calls, times, strict=True):
            for _ in range(4 if found and found[-1] < 1e-3 else 1):
                turn += 1
                start = time.perf_counter()
                call(turn)
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def takes_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this machine, as it was told to see it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
