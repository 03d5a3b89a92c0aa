"""A step's chunks as the model gets them."""

from __future__ import annotations

import torch

from manylora.server.engine.blocks import BlockList
from manylora.server.engine.runner import step_inputs
from manylora.server.engine.scheduler import Chunk
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import Request, SamplingParams

SIZE = 4


def chunk(tokens: list[int], slot: int, blocks: list[int], start: int, count: int) -> Chunk:
    sequence = Sequence.start(Request("id", tokens, SamplingParams()), frozenset())
    sequence.slot, sequence.computed = slot, start
    sequence.blocks = BlockList("", blocks)
    return Chunk(sequence, start, count)


def test_rows_of_decodes_and_prefills() -> None:
    """A decode, a prefill's first chunk, its last chunk, a short prompt whole; in any order."""
    chunks = [
        chunk(list(range(10, 23)), 2, [5, 0, 3], 0, 6),
        chunk(list(range(30, 36)), -1, [7, 2], 5, 1),
        chunk(list(range(40, 50)), 2, [1, 4, 9], 7, 3),
        chunk([60, 61], 0, [8], 0, 2),
    ]
    inputs = step_inputs(chunks, SIZE, torch.device("cpu"))
    assert inputs.token_ids.tolist() == [10, 11, 12, 13, 14, 15, 35, 47, 48, 49, 60, 61]
    assert inputs.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 7, 8, 9, 0, 1]
    assert inputs.sample_rows.tolist() == [6, 9, 11]
    assert inputs.plan.row_slot.tolist() == [2] * 6 + [-1] + [2] * 3 + [0] * 2
    assert inputs.head_plan.row_slot.tolist() == [-1, 2, 0]
    assert inputs.attention.seq_starts.tolist() == [0, 6, 7, 10, 12]
    assert inputs.attention.context.tolist() == [6, 6, 10, 2]
    slots = [5 * 4 + i for i in range(4)] + [0, 1] + [2 * 4 + 1] + [4 * 4 + 3, 9 * 4, 9 * 4 + 1]
    assert inputs.attention.slot_mapping.tolist() == [*slots, 8 * 4, 8 * 4 + 1]
    assert inputs.attention.block_table.shape == (4, 3)
    assert inputs.attention.block_table[0].tolist() == [5, 0, 3]
    assert inputs.attention.block_table[3, 0] == 8


def test_a_step_that_draws_nothing() -> None:
    inputs = step_inputs([chunk([1] * 9, 0, [0, 1], 0, 8)], SIZE, torch.device("cpu"))
    assert inputs.sample_rows.tolist() == []
    assert inputs.head_plan.rows == 0
    assert inputs.head_plan.empty
