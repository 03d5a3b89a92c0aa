"""The device memory that is reserved at the start: the adapters' pool, and the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from manylora import kernels
from manylora.errors import FailedPrecondition
from manylora.server.engine.model import AdaptedModel
from manylora.server.engine.pool import Pool


def reserve_pool(size: int, dtype: torch.dtype, device: torch.device) -> Pool:
    """size: bytes. Raises FailedPrecondition."""
    with _reserving("adapter_bytes", size):
        return Pool(size, dtype, device)


def reserve_cache(model: AdaptedModel, size: int, block_size: int, device: torch.device) -> int:
    """Gives each layer its KV cache [blocks, kv_heads, block_size, head_dim], out of `size` bytes
    for all; returns the number of blocks. Raises FailedPrecondition."""
    layout, dtype = model.kv_layout, model.dtype
    block_bytes = sum(2 * heads * block_size * dim * dtype.itemsize for heads, dim in layout)
    blocks = size // block_bytes
    if blocks < 1:
        raise FailedPrecondition(
            "the KV cache does not hold one block",
            field="kv_cache_bytes",
            found=size,
            wanted=f"at least {block_bytes}",
        )
    shapes = [(blocks, heads, block_size, dim) for heads, dim in layout for _ in "kv"]
    with _reserving("kv_cache_bytes", size):
        tensors = kernels.side_by_side(shapes, dtype, device)
    model.attach_cache(list(zip(tensors[::2], tensors[1::2], strict=True)))
    return blocks


@contextmanager
def _reserving(field: str, size: int) -> Iterator[None]:
    """Raises FailedPrecondition where the system does not have so much memory to give."""
    try:
        yield
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise FailedPrecondition(
            f"the memory cannot be reserved: {error}", field=field, found=f"{size} bytes"
        ) from error
