"""A slice group as the kernels read it: a few int32 on the device, made once a group."""

from __future__ import annotations

import functools

import torch

from manylora.kernels.table import SliceGroup

TILE_WORDS = 5


@functools.lru_cache(maxsize=1 << 14)
def module_words(group: SliceGroup, device: torch.device) -> torch.Tensor:
    """int32 [slices]: the module of each slice."""
    return torch.tensor(group.modules, dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=1 << 14)
def tile_words(group: SliceGroup, columns: int, device: torch.device) -> torch.Tensor:
    """int32 [tiles, 5]: each tile of at most `columns` outputs of one slice.

    Its slice, module, the slice's first column of y and size, the tile's first output within it.
    """
    slices = zip(group.modules, group.starts, group.sizes, strict=True)
    words = [
        (number, module, start, size, first)
        for number, (module, start, size) in enumerate(slices)
        for first in range(0, size, columns)
    ]
    return torch.tensor(words, dtype=torch.int32).to(device)


def is_aligned(group: SliceGroup) -> bool:
    """Whether every slice begins where 16-byte loads may."""
    return all(start % 16 == 0 for start in group.starts)
