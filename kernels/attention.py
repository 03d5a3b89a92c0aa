"""What paged attention needs to know about one step's flat batch of rows."""

from __future__ import annotations

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
    slot_mapping: int64 [rows], ``block * block_size + offset`` where the row's K and V are kept;
        on a GPU -1 for a row that keeps none.
    decodes, chunks: how many sequences have one row, and several, or None where the maker does not
        know; so that no kernel starts for nothing.
    words: int64, the four tensors' addresses, seqs, rows, max_blocks; address: of the words
        (`Batch` in cpu/attention.h).

    Raises ValueError for tensors of another type or shape.
    """

    seq_starts: torch.Tensor
    context: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    decodes: int | None = None
    chunks: int | None = None
    rows: int = field(init=False)
    words: Int64Array = field(init=False, repr=False)
    address: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            tensor: torch.Tensor = getattr(self, name)
            if tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(f"{name}: found {tensor.dtype}; wanted contiguous {dtype}")
        seqs, self.rows = len(self.context), len(self.slot_mapping)
        if len(self.seq_starts) != seqs + 1 or self.block_table.shape[:1] != (seqs,):
            raise ValueError(
                f"seq_starts, block_table: found {len(self.seq_starts)} and "
                f"{tuple(self.block_table.shape)}; wanted [{seqs + 1}] and [{seqs}, max_blocks]"
            )
        pointers = [getattr(self, name).data_ptr() for name in _DTYPES]
        sizes = [seqs, self.rows, self.block_table.shape[1]]
        self.words = np.array(pointers + sizes, np.int64)
        self.address = self.words.ctypes.data


_DTYPES = {
    "seq_starts": torch.int32,
    "context": torch.int32,
    "block_table": torch.int32,
    "slot_mapping": torch.int64,
}


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
        raise ValueError(f"row_counts: found {row_counts}; wanted 0 to context, {context}")
    if context.size and int(context.max()) > block_table.shape[1] * block_size:
        raise ValueError(
            f"block_table: found room for {block_table.shape[1] * block_size} positions; "
            f"wanted {int(context.max())}"
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
        decodes=int((row_counts == 1).sum()),
        chunks=int((row_counts > 1).sum()),
    )
