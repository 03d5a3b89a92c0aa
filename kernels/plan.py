"""One step's grouping of rows by slot: made once on the host, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

MAX_SEGMENT_ROWS = 64
"""A longer run of rows of one slot is cut, so that a segment is one tile of rows everywhere."""

_HEADER = 4


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which rows each slot has. Everything lies in one int32 buffer, so a device needs one copy.

    Attributes:
        rows: rows of the step, with and without an adapter.
        edited: n, rows that have a slot.
        segments: runs of at most `MAX_SEGMENT_ROWS` rows of one slot; a slot may have several.
        row_slot: int32 [rows], the slot of each row, -1 for a plain base row.
        order: int32 [n], indices of the rows that have a slot, stably sorted by slot.
        seg_starts: int32 [segments + 1], segment s is order[seg_starts[s]:seg_starts[s + 1]].
        seg_slot: int32 [segments].
        slots, max_slot: of seg_slot, on the host; max_slot is -1 if there is none.
        words: int32 [rows, n, segments, 0, then the four arrays above], on the device.
        address: of the same words in host memory, for the C++ kernels.
    """

    rows: int
    edited: int
    segments: int
    row_slot: torch.Tensor
    order: torch.Tensor
    seg_starts: torch.Tensor
    seg_slot: torch.Tensor
    words: torch.Tensor
    slots: npt.NDArray[np.int32]
    max_slot: int
    host_words: npt.NDArray[np.int32]
    address: int

    @property
    def empty(self) -> bool:
        """True if no row has an adapter, so that every edit may be skipped."""
        return self.edited == 0

    def rows_of(self, slot: int) -> npt.NDArray[np.int64]:
        """The slot's rows, ascending, on the host."""
        return np.flatnonzero(self.host_words[_HEADER : _HEADER + self.rows] == slot)


def make_plan(row_slots: npt.NDArray[np.int32], device: torch.device | str = "cpu") -> Plan:
    """Groups the rows of one step by their slot.

    Args:
        row_slots: int32 [rows], the slot of each row; any negative number means none.
        device: where the kernels that use the plan run.
    """
    slots = np.asarray(row_slots, dtype=np.int32)
    if slots.ndim != 1:
        raise ValueError(f"row_slots: found shape {slots.shape}; wanted [rows]")
    edited_rows = np.flatnonzero(slots >= 0)
    order = edited_rows[np.argsort(slots[edited_rows], kind="stable")]
    starts = _segment_starts(slots[order])
    rows, edited, segments = len(slots), len(order), len(starts)
    arrays = (np.maximum(slots, -1), order, starts, [edited], slots[order[starts]])
    words = np.concatenate(([rows, edited, segments, 0], *arrays), dtype=np.int32, casting="unsafe")
    on_host = torch.from_numpy(words)
    on_device = on_host.to(device)
    order_at = _HEADER + rows
    starts_at = order_at + edited
    slots_at = starts_at + segments + 1
    return Plan(
        rows=rows,
        edited=edited,
        segments=segments,
        row_slot=on_device[_HEADER:order_at],
        order=on_device[order_at:starts_at],
        seg_starts=on_device[starts_at:slots_at],
        seg_slot=on_device[slots_at:],
        words=on_device,
        slots=words[slots_at:],
        max_slot=int(words[-1]) if segments else -1,
        host_words=words,
        address=on_host.data_ptr(),
    )


class PlanBuffer:
    """A plan at a fixed address, filled anew for each step: what a captured CUDA graph reads.

    plan: as large as it may become, each row a segment of its own, of any slot. How much there
    really is the kernels read from its words; so `words`, `row_slot` and `rows_of` are the step's,
    the other tensors empty, and the reference, which wants them, cannot use it.
    """

    def __init__(self, rows: int, slots: int, device: torch.device | str = "cpu") -> None:
        self._host = np.zeros(_HEADER + 4 * rows + 1, np.int32)
        words = torch.zeros(len(self._host), dtype=torch.int32, device=device)
        none = words[:0]
        self.plan = Plan(
            rows=rows,
            edited=rows,
            segments=rows,
            row_slot=words[_HEADER : _HEADER + rows],
            order=none,
            seg_starts=none,
            seg_slot=none,
            words=words,
            slots=np.arange(slots, dtype=np.int32),
            max_slot=slots - 1,
            host_words=self._host,
            address=self._host.ctypes.data,
        )
        self.fill(np.full(rows, -1, np.int32))

    def fill(self, row_slots: npt.NDArray[np.int32]) -> None:
        """row_slots: as in `make_plan`. Raises ValueError for other rows, or slots beyond."""
        found = make_plan(row_slots)
        if found.rows != self.plan.rows or found.max_slot > self.plan.max_slot:
            raise ValueError(
                f"row_slots: found {found.rows} rows and slots to {found.max_slot}; "
                f"wanted {self.plan.rows} rows and slots to {self.plan.max_slot}"
            )
        self._host[: len(found.host_words)] = found.host_words
        self.plan.words.copy_(torch.from_numpy(self._host))


def _segment_starts(sorted_slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Where a segment begins: at each new slot, and every MAX_SEGMENT_ROWS rows within a slot."""
    positions = np.arange(len(sorted_slots))
    is_first = np.ones(len(sorted_slots), dtype=bool)
    is_first[1:] = sorted_slots[1:] != sorted_slots[:-1]
    run_begin = np.maximum.accumulate(np.where(is_first, positions, 0))
    return np.flatnonzero((positions - run_begin) % MAX_SEGMENT_ROWS == 0)
