"""Where adapters lie on the device: arenas in the pool, and slots in the edit table.

Owned by the engine's thread; written between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manylora.adapters_store.head import Head
from manylora.errors import FailedPrecondition
from manylora.kernels import EditTable
from manylora.server.engine.model.overrides import Overrides
from manylora.server.engine.packing import PackedAdapter
from manylora.server.engine.pool import Arena, Pool
from manylora.server.engine.prefix import Prefix


@dataclass(slots=True, frozen=True)
class Placed:
    """An adapter on the device. packed: without its buffer, which has been copied."""

    packed: PackedAdapter
    arena: Arena
    slot: int

    @property
    def prefix(self) -> Prefix | None:
        """What it puts before its prompts."""
        return None if self.packed.prefix is None else Prefix(self.packed.prefix, self.arena)


class Placement:
    """Places packed adapters, as long as there is room, and takes them away.

    Args:
        pool, table: the device's; the table has a row for each slot.
        overrides: written beside the table.
    """

    def __init__(self, pool: Pool, table: EditTable, overrides: Overrides) -> None:
        self._pool = pool
        self._table = table
        self._overrides = overrides
        self._placed: dict[int, Placed] = {}  # by slot
        self._free_slots = list(range(table.slots - 1, -1, -1))

    @property
    def size(self) -> int:
        """Of the pool, in elements."""
        return self._pool.size

    @property
    def slots(self) -> int:
        return self._table.slots

    @property
    def free_size(self) -> int:
        return self._pool.size - self._pool.used

    @property
    def slots_used(self) -> int:
        return len(self._placed)

    def check_fits(self, packed: PackedAdapter) -> None:
        """Raises FailedPrecondition for what is larger than the whole pool. Any thread."""
        room = self._pool.size * self._pool.tensor.element_size()
        if packed.bytes > room:
            raise FailedPrecondition(
                "adapter is larger than the adapter memory",
                field="adapter",
                found=f"{packed.bytes} bytes",
                wanted=f"at most {room} bytes",
            )

    def place(self, packed: PackedAdapter) -> Placed:
        """Copies an adapter into the pool and takes its buffer away; there must be a free slot and
        its size free, in however many gaps."""
        size = packed.buffer.numel()
        arena = self._pool.allocate(size)
        if arena is None:
            self._compact()
            arena = self._pool.allocate(size)
            assert arena is not None
        self._pool.tensor[arena.start : arena.start + size].copy_(packed.buffer)
        packed.buffer = torch.empty(0, dtype=packed.buffer.dtype)
        placed = Placed(packed, arena, self._free_slots.pop())
        self._placed[placed.slot] = placed
        self._write_row(placed)
        return placed

    def remove(self, placed: Placed) -> None:
        self._pool.free(placed.arena)
        self._table.clear(placed.slot)
        self._overrides.clear(placed.slot)
        del self._placed[placed.slot]
        self._free_slots.append(placed.slot)

    def bytes_of(self, placed: Placed | None) -> int:
        size = 0 if placed is None else placed.arena.size
        return size * self._pool.tensor.element_size()

    def head_of(self, placed: Placed) -> Head | None:
        """An adapter's head, as it lies in the pool now."""
        packed = placed.packed.head
        return None if packed is None else packed.view(self._pool.tensor, placed.arena.start)

    def _compact(self) -> None:
        self._pool.compact()
        for placed in self._placed.values():
            self._write_row(placed)

    def _write_row(self, placed: Placed) -> None:
        packed, start = placed.packed, placed.arena.start
        self._table.write(placed.slot, packed.rank, packed.scale, packed.offsets_at(start))
        self._overrides.write(placed.slot, packed.overrides, self._pool.tensor, start)
