"""A and B as the CPU's kernel of the edits reads them: argument checks and the call into C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import addressof, c_int64
from dataclasses import dataclass

import numpy as np
import torch

from manylora.kernels.cpu import library
from manylora.kernels.cpu.memory import huge_empty

_DTYPES = library.DTYPES

# buffer, dtype, matrices, count, end
_pack = library.kernel("pack", "5q")
_WORDS, _START = 10, 6  # of a matrix; where it begins, among them
_LINE = 64  # bytes
# Of compact.h: elements of the header, of a unit, and of the exceptions that a unit has at most.
_HEADER, _UNIT, _EXCEPTIONS = 32, 128, 8


@dataclass(slots=True, frozen=True)
class _Layout:
    """Blocks of `block` lines, the last of those that are left, rounded up to whole units;
    [columns / depth][lines][depth] each, columns rounded up to whole depths."""

    block: int
    unit: int
    depth: int

    def numel(self, lines: int, columns: int) -> int:
        return -(-lines // self.unit) * self.unit * -(-columns // self.depth) * self.depth


_ROWS = _Layout(1, 1, 1)
_TILES = _Layout(16, 1, 2)
_COLUMNS = _Layout(64, 16, 1)
_COLUMN_PAIRS = _Layout(64, 16, 2)


def pack_a(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A [r, in] as the kernel of the ISA in use streams it, flat: row-major, as it is.

    For bfloat16 on AMX blocks of 16 ranks, the last one of what is left, [in/2][ranks][2] each, in
    padded with a zero to whole pairs; then made compact (compact.h), as B is.
    """
    buffer, _, end = _pack_matrices([(a, _layout_a(dtype))], dtype, 0, torch.empty)
    return buffer[:end]


def pack_b(b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B [out, r] as the kernel streams it, flat: blocks of 64 outputs, [r/d][64][d] each.

    The last block has 16, 32 or 48 outputs where that is enough. d, the depth, is 2 for bfloat16
    (pairs of ranks, for vdpbf16ps), else 1. Padded with zeros to whole pairs and 16 outputs.
    """
    buffer, _, end = _pack_matrices([(b, _layout_b(dtype))], dtype, 0, torch.empty)
    return buffer[:end]


def pack_factors(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, before: int
) -> tuple[torch.Tensor, np.ndarray]:
    """See `manylora.kernels.reference.pack_factors`. The buffer lies in huge pages.

    Raises:
        ValueError: a factor that is no matrix.
    """
    layouts = (_layout_a(dtype), _layout_b(dtype))
    matrices = [pair for factor in factors for pair in zip(factor, layouts, strict=True)]
    buffer, starts, end = _pack_matrices(matrices, dtype, before, huge_empty)
    line = _LINE // dtype.itemsize
    return buffer[: -(-end // line) * line], starts.reshape(-1, 2)


def _pack_matrices(
    matrices: Sequence[tuple[torch.Tensor, _Layout]],
    dtype: torch.dtype,
    before: int,
    empty: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, np.ndarray, int]:
    """Each from a cache line on, after `before` elements; a buffer with room for them and for the
    rest of the last line, where each begins, and where the last ends."""
    line = _LINE // dtype.itemsize
    known = [m if m.dtype in _DTYPES else m.to(dtype) for m, _ in matrices]
    words: list[tuple[int, ...]] = []
    room = before + line
    for matrix, (_, layout) in zip(known, matrices, strict=True):
        lines, columns = matrix.shape
        where = (matrix.data_ptr(), _DTYPES[matrix.dtype], *matrix.stride())
        words.append((*where, lines, columns, 0, layout.block, layout.unit, layout.depth))
        room += line + _room(layout.numel(lines, columns), dtype)
    table = np.array(words, np.int64).reshape(len(words), _WORDS)
    buffer = empty((room,), dtype=dtype)
    end = c_int64(before)
    _pack(buffer.data_ptr(), _DTYPES[dtype], table.ctypes.data, len(words), addressof(end))
    return buffer, table[:, _START], end.value


def _room(numel: int, dtype: torch.dtype) -> int:
    """Elements that a packed matrix may take."""
    if not _is_compact(dtype):
        return numel
    return _HEADER + max(numel, -(-numel // _UNIT) * (_UNIT * 3 // 4 + _EXCEPTIONS))


def _is_compact(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and library.current_isa() == "amx"


def _layout_a(dtype: torch.dtype) -> _Layout:
    return _TILES if _is_compact(dtype) else _ROWS


def _layout_b(dtype: torch.dtype) -> _Layout:
    return _COLUMN_PAIRS if dtype == torch.bfloat16 else _COLUMNS
