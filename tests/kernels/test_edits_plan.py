"""Grouping of rows by slot, slice groups, and the edit table's bookkeeping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.kernels import EditTable, PlanBuffer, SliceGroup, make_plan
from manylora.kernels.plan import MAX_SEGMENT_ROWS


@settings(deadline=None, derandomize=True)
@given(
    runs=st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 150)), max_size=6),
    shuffled=st.booleans(),
)
def test_plan_groups_every_edited_row_once(runs: list[tuple[int, int]], shuffled: bool) -> None:
    slots = np.array([slot for slot, count in runs for _ in range(count)], np.int32)
    if shuffled:
        np.random.default_rng(0).shuffle(slots)
    plan = make_plan(slots)
    assert plan.rows == len(slots)
    assert plan.row_slot.tolist() == slots.tolist()
    wanted = sorted(np.flatnonzero(slots >= 0).tolist(), key=lambda row: slots[row])
    assert plan.order.tolist() == wanted
    assert plan.empty == (not wanted)
    starts, seg_slot = plan.seg_starts.tolist(), plan.seg_slot.tolist()
    assert len(seg_slot) == plan.segments == len(starts) - 1
    assert starts[0] == 0
    assert starts[-1] == plan.edited == len(wanted)
    for segment, slot in enumerate(seg_slot):
        rows = wanted[starts[segment] : starts[segment + 1]]
        assert 0 < len(rows) <= MAX_SEGMENT_ROWS
        assert {int(slots[row]) for row in rows} == {slot}
    whole = [-(-wanted_of // MAX_SEGMENT_ROWS) for wanted_of in np.bincount(slots[slots >= 0])]
    assert plan.segments == sum(whole), "more segments than needed"
    assert plan.max_slot == max(seg_slot, default=-1)


def test_plan_lies_in_one_buffer() -> None:
    plan = make_plan(np.array([1, -1, 0, 1], np.int32))
    assert plan.words.tolist() == [4, 3, 2, 0, 1, -1, 0, 1, 2, 0, 3, 0, 1, 3, 0, 1]
    assert plan.address == plan.words.data_ptr()


def test_plan_wants_one_dimension() -> None:
    with pytest.raises(ValueError, match="row_slots"):
        make_plan(np.zeros((2, 2), np.int32))


def test_a_plan_buffer_keeps_its_addresses() -> None:
    buffer = PlanBuffer(rows=4, slots=3)
    plan = buffer.plan
    addresses = plan.address, plan.words.data_ptr(), plan.row_slot.data_ptr()
    for slots in ([1, -1, 0, 1], [2, 1, 0, -1], [-1] * 4, [2, 2, 2, 2]):
        wanted = make_plan(np.array(slots, np.int32))
        buffer.fill(np.array(slots, np.int32))
        assert plan.words[: len(wanted.words)].tolist() == wanted.words.tolist()
        assert plan.host_words.tolist() == plan.words.tolist()
        assert plan.row_slot.tolist() == slots
        assert set(wanted.slots) <= set(plan.slots)
        assert plan.rows_of(2).tolist() == wanted.rows_of(2).tolist()
        assert addresses == (plan.address, plan.words.data_ptr(), plan.row_slot.data_ptr())
    assert plan.address == plan.host_words.ctypes.data
    for wrong in ([0, 1, 2], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="wanted 4 rows and slots to 2"):
            buffer.fill(np.array(wrong, np.int32))
    assert plan.row_slot.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "parts",
    [((), (), ()), ((0,), (0, 1), (1, 1)), ((-1,), (0,), (4,)), ((0,), (0,), (0,))],
)
def test_slice_group_refuses_nonsense(parts: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="slice"):
        SliceGroup(*parts)


def test_table_keeps_its_addresses_and_forgets_a_cleared_slot() -> None:
    table = EditTable(3, 2)
    tensors = (table.rank, table.scale, table.offsets)
    addresses = [tensor.data_ptr() for tensor in tensors]
    offsets = np.full((2, 5), -1, np.int64)
    offsets[1] = (0, 64, 128, -1, -1)
    row = (np.array([0, 4], np.int32), np.array([0, 0.5], np.float32), offsets)
    table.write(1, *row)
    assert table.rank.tolist() == [[0, 0], [0, 4], [0, 0]]
    assert table.scale[1].tolist() == [0, 0.5]
    assert torch.equal(table.offsets[1], torch.from_numpy(offsets))
    assert table.scales_inputs(SliceGroup.single(1, 8))
    assert not table.scales_inputs(SliceGroup.single(0, 8))
    table.clear(1)
    assert (table.rank == 0).all()
    assert (table.offsets == -1).all()
    assert not table.scales_inputs(SliceGroup.single(1, 8))
    assert addresses == [tensor.data_ptr() for tensor in tensors]


def test_table_refuses_a_row_that_cannot_be() -> None:
    table = EditTable(2, 2)
    scale, absent = np.ones(2, np.float32), np.full((2, 5), -1, np.int64)
    with pytest.raises(ValueError, match="shapes"):
        table.write(0, np.zeros(3, np.int32), scale, absent)
    with pytest.raises(ValueError, match="without offsets"):
        table.write(0, np.array([0, 1], np.int32), scale, absent)
    with pytest.raises(ValueError, match="negative"):
        table.write(0, np.array([0, -1], np.int32), scale, absent)
    assert (table.rank == 0).all()
