"""A lowered adapter, packed into one host buffer, ready for one copy into its arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit

ALIGNMENT = 64  # bytes


class BPacker(Protocol):
    """The part of a kernel backend that says how B lies in the pool."""

    def pack_b(self, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(slots=True)
class PackedAdapter:
    """One adapter's arena, on the host, and its row of the edit table.

    buffer: [numel] in the pool's dtype; rank int32 [modules]; scale float32 [modules];
    offsets int64 [modules, 5] (A, B, in_scale, out_scale, bias) in elements from the buffer's
    start, -1 where absent.
    """

    buffer: torch.Tensor
    rank: np.ndarray
    scale: np.ndarray
    offsets: np.ndarray

    @property
    def bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def offsets_at(self, start: int) -> np.ndarray:
        """Offsets when the arena begins at pool element `start`."""
        return np.where(self.offsets < 0, -1, self.offsets + start)


def pack(
    lowered: LoweredAdapter, modules: Mapping[str, int], packer: BPacker, dtype: torch.dtype
) -> PackedAdapter:
    """Packs every tensor at its true rank. modules: id of each module name."""
    parts: list[tuple[int, int, int, torch.Tensor]] = []  # module, column, start, flat tensor
    rank = np.zeros(len(modules), np.int32)
    scale = np.zeros(len(modules), np.float32)
    align = ALIGNMENT // dtype.itemsize
    end = 0
    for name, edit in lowered.edits.items():
        module = modules[name]
        rank[module], scale[module] = edit.rank, edit.scale
        for column, tensor in enumerate(_pool_tensors(edit, packer, dtype)):
            if tensor is not None:
                parts.append((module, column, end, tensor))
                end += -(-tensor.numel() // align) * align
    buffer = torch.zeros(end, dtype=dtype)
    offsets = np.full((len(modules), 5), -1, np.int64)
    for module, column, start, tensor in parts:
        buffer[start : start + tensor.numel()] = tensor
        offsets[module, column] = start
    return PackedAdapter(buffer, rank, scale, offsets)


def _pool_tensors(
    edit: ModuleEdit, packer: BPacker, dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """A, B, in_scale, out_scale, bias as they lie in the pool: flat, vectors as float32 bytes."""
    a = None if edit.a is None else edit.a.to(dtype).reshape(-1)
    b = None if edit.b is None else packer.pack_b(edit.b, dtype)
    vectors = [
        None if v is None else v.to(torch.float32).contiguous().reshape(-1).view(dtype)
        for v in (edit.in_scale, edit.out_scale, edit.bias)
    ]
    return [a, b, *vectors]
