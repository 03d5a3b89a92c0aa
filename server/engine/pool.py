"""The one block of device memory that resident adapters share."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import torch

from manylora.kernels import empty


@dataclass(slots=True, order=True)
class Arena:
    """One resident adapter's contiguous part of the pool, in elements. Moves on compaction."""

    start: int
    size: int


class Pool:
    """First-fit arenas in one flat tensor [elements] of the base model's dtype."""

    def __init__(self, bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = empty((bytes // dtype.itemsize,), dtype, device)
        self._arenas: list[Arena] = []  # by start

    @property
    def used(self) -> int:
        return sum(arena.size for arena in self._arenas)

    @property
    def size(self) -> int:
        return self.tensor.numel()

    def allocate(self, size: int) -> Arena | None:
        """The first gap that is large enough, or None; `compact` may make one."""
        start = 0
        for arena in self._arenas:
            if arena.start - start >= size:
                break
            start = arena.start + arena.size
        if self.size - start < size:
            return None
        arena = Arena(start, size)
        insort(self._arenas, arena)
        return arena

    def free(self, arena: Arena) -> None:
        self._arenas = [a for a in self._arenas if a is not arena]

    def compact(self) -> None:
        """Slides every arena down so that all free memory is one gap at the end."""
        start = 0
        for arena in self._arenas:
            if arena.start != start:
                moved = self.tensor[arena.start : arena.start + arena.size].clone()
                self.tensor[start : start + arena.size] = moved
                arena.start = start
            start += arena.size
