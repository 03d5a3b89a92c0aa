"""The tile plan: tiles, warps and stages from shapes and the target alone; nothing is tuned.

No size depends on how many rows or adapters a step has, so a row's bits do not either.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

SHARED_BYTES = {
    ("cuda", 80): 163 << 10,
    ("cuda", 86): 99 << 10,
    ("cuda", 89): 99 << 10,
    ("cuda", 90): 227 << 10,
    ("cuda", 100): 227 << 10,
    ("cuda", 103): 227 << 10,
    ("cuda", 120): 99 << 10,
    ("hip", "gfx942"): 64 << 10,
    ("hip", "gfx950"): 160 << 10,
}
"""Shared memory that one block may have (CUDA programming guide; CDNA ISA)."""

_LEAST_SHARED = 64 << 10
_TENSOR_MEMORY = {("cuda", 100), ("cuda", 103)}
_LARGE_SHARED = 200 << 10
"""Hopper and Blackwell for data centres: their matrix units read operands from shared memory, where
others hold them in registers, which 64 keys by 64 rows would overfill."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the tile plan knows of a GPU.

    backend: "cuda" or "hip". shared: bytes a block. tensor_memory: accumulators of products lie in
    a memory of their own (Blackwell for data centres).
    """

    backend: str
    shared: int
    tensor_memory: bool = False


@functools.cache
def target() -> Target:
    """The current GPU; in the interpreter, one with little of everything."""
    if triton.knobs.runtime.interpret:
        return Target("cuda", _LEAST_SHARED)
    found = triton.runtime.driver.active.get_current_target()
    shared = SHARED_BYTES.get((found.backend, found.arch), _LEAST_SHARED)
    return Target(found.backend, shared, (found.backend, found.arch) in _TENSOR_MEMORY)


@dataclass(frozen=True, slots=True)
class ShrinkTiles:
    """h = A x: `rows` by `ranks` a program, over `chunk` of x's columns, `k` at a time."""

    rows: int
    ranks: int
    k: int
    chunk: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class ExpandTiles:
    """y += B h: `rows` by `columns` a program, `ranks` at a time."""

    rows: int
    ranks: int
    columns: int
    warps: int


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """x Wᵀ: `rows` by `columns` a program, `k` at a time; B h in steps of `ranks`."""

    rows: int
    columns: int
    k: int
    ranks: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class ProjectTiles:
    """h = A x in training: `rows` by `ranks` a program, `k` at a time."""

    rows: int
    ranks: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """`queries` positions of `group` heads by `keys` keys, over at most `split` keys a program.

    group, dim: padded to powers of two. split 0: all keys.
    """

    queries: int
    group: int
    keys: int
    dim: int
    split: int
    warps: int
    stages: int


MOST_SPLITS = 8
"""Planes cost the expand a load each; eight fill a GPU from one adapter's A."""

LEAST_CHUNK = 256


@functools.cache
def shrink_tiles(in_size: int, dtype: torch.dtype, on: Target) -> ShrinkTiles:
    k = 128 if dtype.itemsize == 2 else 64
    chunk = max(LEAST_CHUNK, round_up(-(-in_size // MOST_SPLITS), k))
    stages = 4 if on.backend == "cuda" else 2
    return ShrinkTiles(16, 32, k, chunk, -(-in_size // chunk), 4, stages)


@functools.cache
def expand_tiles(dtype: torch.dtype) -> ExpandTiles:
    return ExpandTiles(16, 32, 128 if dtype == torch.bfloat16 else 64, 4)


@functools.cache
def product_tiles(dtype: torch.dtype, on: Target) -> ProductTiles:
    if dtype.itemsize == 4:
        return ProductTiles(32, 32, 32, 16, 4, 2)
    if on.shared >= _LARGE_SHARED:
        # Registers overflow in an epilogue over 128 columns that come from tensor memory, and where
        # B is float16 and becomes tf32.
        is_half = dtype == torch.float16
        columns = 64 if on.tensor_memory or is_half else 128
        return ProductTiles(128, columns, 64, 16 if is_half else 32, 8, 4)
    stages = 3 if on.backend == "cuda" and on.shared >= 128 << 10 else 2
    return ProductTiles(128, 128, 64, 16, 8, stages)


@functools.cache
def project_tiles(dtype: torch.dtype) -> ProjectTiles:
    if dtype.itemsize == 4:
        return ProjectTiles(32, 32, 32, 4, 2)
    return ProjectTiles(64, 32, 64, 4, 3)


@functools.cache
def training_tiles(dtype: torch.dtype) -> ExpandTiles:
    """For y += h Bᵀ, and with as many ranks for hᵀ x over `rows` at a time."""
    if dtype.itemsize == 4:
        return ExpandTiles(32, 32, 32, 4)
    return ExpandTiles(64, 32, 64, 4)


SPLIT_KEYS = 256
"""Keys that one program of a decode reads: with 8 KV heads, 2,000 keys of one sequence already
keep 64 programs busy; a partial result is 1/64 of what it stands for."""


@functools.cache
def chunk_tiles(group: int, head_dim: int, dtype: torch.dtype, on: Target) -> AttentionTiles:
    """For the sequences with several rows."""
    group, dim = power_of_two(group), max(16, power_of_two(head_dim))
    rows = 16 if dtype.itemsize == 4 else 32 if dim > 128 else 64
    keys = 64 if on.shared >= _LARGE_SHARED and dtype.itemsize == 2 and dim <= 128 else 32
    stages = 1 if dtype.itemsize == 4 else 3 if on.backend == "cuda" and keys == 32 else 2
    return AttentionTiles(max(1, rows // group), group, keys, dim, 0, 4, stages)


@functools.cache
def decode_tiles(group: int, head_dim: int, dtype: torch.dtype, on: Target) -> AttentionTiles:
    """For the sequences with one row."""
    group, dim = max(16, power_of_two(group)), max(16, power_of_two(head_dim))
    keys = 64 if on.backend == "cuda" and dtype.itemsize == 2 and dim <= 128 else 32
    stages = 2 if dtype.itemsize == 2 else 1
    return AttentionTiles(1, group, keys, dim, SPLIT_KEYS, 4, stages)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
