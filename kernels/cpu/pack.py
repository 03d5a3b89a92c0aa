"""A and B as the CPU's kernel of the edits reads them: argument checks and the call into C++."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass

import numpy as np
import torch

from manylora.kernels.cpu import library
from manylora.kernels.cpu.library import INT64

_DTYPES = library.DTYPES

_pack = library.kernel("pack", c_void_p, INT64, c_void_p, INT64)  # buffer, dtype, matrices, count


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
    padded with a zero to whole pairs.
    """
    rank, in_size = a.shape
    packed = torch.empty(packed_a_numel(rank, in_size, dtype), dtype=dtype)
    pack_factors_(packed, [(0, a)], [])
    return packed


def pack_b(b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B [out, r] as the kernel streams it, flat: blocks of 64 outputs, [r/d][64][d] each.

    The last block has 16, 32 or 48 outputs where that is enough. d, the depth, is 2 for bfloat16
    (pairs of ranks, for vdpbf16ps), else 1. Padded with zeros to whole pairs and 16 outputs.
    """
    out, rank = b.shape
    packed = torch.empty(packed_b_numel(out, rank, dtype), dtype=dtype)
    pack_factors_(packed, [], [(0, b)])
    return packed


def packed_a_numel(r: int, in_size: int, dtype: torch.dtype) -> int:
    """Elements of `pack_a`'s result."""
    return _layout_a(dtype).numel(r, in_size)


def packed_b_numel(out: int, r: int, dtype: torch.dtype) -> int:
    """Elements of `pack_b`'s result."""
    return _layout_b(dtype).numel(out, r)


def pack_factors_(
    buffer: torch.Tensor,
    a: Sequence[tuple[int, torch.Tensor]],
    b: Sequence[tuple[int, torch.Tensor]],
) -> None:
    """See `manylora.kernels.reference.pack_factors_`.

    Raises:
        ValueError: a buffer with gaps, a factor that is no matrix, or that does not fit in.
    """
    matrices: list[tuple[int, ...]] = []
    tensors: list[torch.Tensor] = []
    for layout, factors in ((_layout_a(buffer.dtype), a), (_layout_b(buffer.dtype), b)):
        form = (layout.block, layout.unit, layout.depth)
        for start, factor in factors:
            known = factor if factor.dtype in _DTYPES else factor.to(buffer.dtype)
            lines, columns = known.shape
            if not 0 <= start <= buffer.numel() - layout.numel(lines, columns):
                raise ValueError(
                    f"pack_factors_: {tuple(known.shape)} from element {start} on does not fit in "
                    f"a buffer of {buffer.numel()}"
                )
            where = (known.data_ptr(), _DTYPES[known.dtype], *known.stride())
            matrices.append((*where, lines, columns, start, *form))
            tensors.append(known)
    if not buffer.is_contiguous():
        raise ValueError(f"pack_factors_: wanted a contiguous buffer; found {buffer.stride()}")
    words = np.array(matrices, np.int64)
    _pack(buffer.data_ptr(), _DTYPES[buffer.dtype], words.ctypes.data, len(matrices))


def _layout_a(dtype: torch.dtype) -> _Layout:
    return _TILES if dtype == torch.bfloat16 and library.current_isa() == "amx" else _ROWS


def _layout_b(dtype: torch.dtype) -> _Layout:
    return _COLUMN_PAIRS if dtype == torch.bfloat16 else _COLUMNS
