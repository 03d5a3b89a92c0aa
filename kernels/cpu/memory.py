"""Memory in huge pages, for what a step reads once from end to end: weights, KV cache, pool.

A processor finds a 4 KiB page by a table that itself lies in memory, in a virtual machine by two of
them; with 2 MiB pages, reading beyond the cache was 1.3 times as fast on the machine measured.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch

_HUGE = 2 << 20
_CHUNK = 32 << 20


def huge_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, zeros, in huge pages where the system has them to give.

    Memory that nobody has written yet takes none.
    """
    numel = torch.Size(shape).numel()
    # A whole page more, so that it can begin where one does. Private: systems that have huge pages
    # to give seldom give them to shared memory, which is Python's default.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(numel * dtype.itemsize, 1) + _HUGE, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + numel * dtype.itemsize].view(dtype).view(shape)


class HugeArena:
    """Hands out tensors that lie side by side in huge pages, as small ones alone could not."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that begins on a cache line."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > len(self._chunk):
            self._chunk = huge_empty([max(size, _CHUNK)], torch.uint8)
        taken = self._chunk[:size]
        self._chunk = self._chunk[-(-size // 64) * 64 :]
        return taken.view(dtype).view(shape)
