"""What paged attention needs to know about one step's flat batch of rows."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True)
class AttentionBatch:
    """One step's rows, by sequence; made once a step and used by every layer.

    Sequence s owns rows ``seq_starts[s]`` to ``seq_starts[s + 1]`` of the flat batch. They are the
    last rows of its context: row j of n has position ``context[s] - n + j``, and sees the keys at
    positions 0 to its own (fewer with a sliding window).

    seq_starts: int32 [seqs + 1].
    context: int32 [seqs], KV length of each sequence, this step's rows included.
    block_table: int32 [seqs, max_blocks], cache block of the sequence's positions
        ``i * block_size`` onward. Entries that no row sees are never followed.
    slot_mapping: int64 [rows], ``block * block_size + offset`` where the row's K and V are kept.
    """

    seq_starts: torch.Tensor
    context: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    native: ctypes.Structure | None = field(default=None, init=False, repr=False, compare=False)


def row_positions(row_counts: Int32Array, context: Int32Array) -> Int64Array:
    """The position of every row of the flat batch: int64 [rows].

    row_counts: rows of each sequence in this step. context: KV lengths, these rows included.
    """
    starts = np.cumsum(row_counts, dtype=np.int64) - row_counts
    first: Int64Array = np.repeat(context - row_counts - starts, row_counts)
    return first + np.arange(first.size, dtype=np.int64)


def make_batch(
    row_counts: Int32Array,
    context: Int32Array,
    block_table: Int32Array,
    block_size: int,
    device: torch.device | str = "cpu",
) -> AttentionBatch:
    """Builds the batch from host arrays.

    row_counts: int32 [seqs], each 0 to its context. context: int32 [seqs].
    block_table: int32 [seqs, max_blocks], padded with anything. Raises ValueError when a
    sequence's rows exceed its context or its context exceeds the table.
    """
    if (row_counts > context).any() or (row_counts < 0).any():
        raise ValueError(f"row_counts must be 0 to context, found {row_counts} for {context}")
    if context.size and int(context.max()) > block_table.shape[1] * block_size:
        raise ValueError(
            f"block_table holds {block_table.shape[1] * block_size} positions, "
            f"context needs {int(context.max())}"
        )
    positions = row_positions(row_counts, context)
    sequence = np.repeat(np.arange(len(row_counts)), row_counts)
    blocks = block_table[sequence, positions // block_size].astype(np.int64)
    seq_starts = np.zeros(len(row_counts) + 1, np.int32)
    np.cumsum(row_counts, out=seq_starts[1:])
    return AttentionBatch(
        torch.from_numpy(seq_starts).to(device),
        torch.from_numpy(np.ascontiguousarray(context, np.int32)).to(device),
        torch.from_numpy(np.ascontiguousarray(block_table, np.int32)).to(device),
        torch.from_numpy(blocks * block_size + positions % block_size).to(device),
    )
