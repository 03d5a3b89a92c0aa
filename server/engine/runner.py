"""One step on the device: chunks in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from manylora.kernels import make_plan
from manylora.kernels.attention import make_batch, row_positions
from manylora.server.engine.model import AdaptedModel, StepInputs
from manylora.server.engine.prefix import Prefix, virtual_rows
from manylora.server.engine.scheduler import Chunk


def run_step(
    model: AdaptedModel, chunks: Seq[Chunk], block_size: int, device: torch.device
) -> Tensor:
    """Logits float32 [chunks that sample, vocab], in the chunks' order."""
    return model.forward(step_inputs(chunks, block_size, device))


def step_inputs(chunks: Seq[Chunk], block_size: int, device: torch.device) -> StepInputs:
    counts = np.array([c.count for c in chunks], np.int32)
    context = np.array([c.start + c.count for c in chunks], np.int32)
    samples = np.array([c.samples for c in chunks], bool)
    tokens = np.fromiter(
        (t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.count]),
        np.int64,
        count=int(counts.sum()),
    )
    positions = row_positions(counts, context)
    slots = _row_slots(chunks, counts, positions)
    sampled = (np.cumsum(counts, dtype=np.int64) - 1)[samples]
    virtual = virtual_rows(_prefixes(chunks), device)
    if virtual is not None:
        tokens = np.maximum(tokens, 0)
    return StepInputs(
        token_ids=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        plan=make_plan(slots, device),
        head_plan=make_plan(slots[sampled], device),
        attention=make_batch(counts, context, _block_table(chunks), block_size, device),
        sample_rows=torch.from_numpy(sampled).to(device),
        virtual=virtual,
    )


def _row_slots(chunks: Seq[Chunk], counts: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """int32 [rows]: each row's slot, -1 for the base's and for those before an invocation."""
    slots = np.repeat(np.array([c.sequence.slot for c in chunks], np.int32), counts)
    first = np.array([c.sequence.acts_from for c in chunks], np.int64)
    if first.any():
        slots[positions < np.repeat(first, counts)] = -1
    return slots


def _prefixes(chunks: Seq[Chunk]) -> Iterator[tuple[int, range, Prefix]]:
    """The sequences that have virtual tokens among their rows."""
    row = 0
    for chunk in chunks:
        sequence = chunk.sequence
        if chunk.start < sequence.prefix_tokens and sequence.prefix is not None:
            end = min(chunk.start + chunk.count, sequence.prefix_tokens)
            yield row, range(chunk.start, end), sequence.prefix
        row += chunk.count


def _block_table(chunks: Seq[Chunk]) -> np.ndarray:
    """int32 [chunks, longest], rows padded with block 0."""
    lists = [c.sequence.blocks.blocks for c in chunks if c.sequence.blocks is not None]
    table = np.zeros((len(lists), max(map(len, lists))), np.int32)
    for row, blocks in zip(table, lists, strict=True):
        row[: len(blocks)] = blocks
    return table
