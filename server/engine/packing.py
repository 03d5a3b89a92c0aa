"""A lowered adapter, packed into one host buffer, ready for one copy into its arena."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from manylora import kernels
from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit
from manylora.adapters_store.head import Head, HeadLayer

ALIGNMENT = 64  # bytes


class Packer(Protocol):
    """The part of a kernel backend that says how A and B lie in the pool."""

    def packed_a_numel(self, r: int, in_size: int, dtype: torch.dtype) -> int: ...

    def packed_b_numel(self, out: int, r: int, dtype: torch.dtype) -> int: ...

    def pack_factors_(
        self,
        buffer: torch.Tensor,
        a: Sequence[tuple[int, torch.Tensor]],
        b: Sequence[tuple[int, torch.Tensor]],
    ) -> None: ...


@dataclass(slots=True, frozen=True)
class PackedPrefix:
    """What comes before the adapter's prompts: rows of `width` elements, from element `start` of
    its buffer on. keys_values: rows are [layers, 2, kv_heads * head_dim], else embeddings."""

    tokens: int
    width: int
    start: int
    keys_values: bool


@dataclass(slots=True, frozen=True)
class PackedTensor:
    """Where a tensor lies in a buffer, in any dtype; start: in the buffer's elements."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, pool: torch.Tensor, start: int) -> torch.Tensor:
        """The tensor, where the buffer begins at the pool's element `start`."""
        begin = start + self.start
        bytes = math.prod(self.shape) * self.dtype.itemsize
        elements = pool[begin : begin + -(-bytes // pool.element_size())]
        return elements.view(self.dtype)[: math.prod(self.shape)].view(self.shape)


@dataclass(slots=True, frozen=True)
class PackedOverride:
    """One module's tensors that are no edit of the kernels, by `ModuleEdit`'s names."""

    tensors: Mapping[str, PackedTensor]
    scale: float


@dataclass(slots=True, frozen=True)
class PackedHead:
    """A head whose layers, weight and bias of each, lie in the buffer. like: without layers."""

    like: Head
    layers: Mapping[str, tuple[PackedTensor, PackedTensor | None]]

    def view(self, pool: torch.Tensor, start: int) -> Head:
        """The head, where the buffer begins at the pool's element `start`."""
        layers = {
            name: HeadLayer(
                weight.view(pool, start), None if bias is None else bias.view(pool, start)
            )
            for name, (weight, bias) in self.layers.items()
        }
        return replace(self.like, layers=layers)


@dataclass(slots=True)
class PackedAdapter:
    """One adapter's arena, on the host, and its row of the edit table.

    buffer: [numel] in the pool's dtype; rank int32 [modules]; scale float32 [modules];
    offsets int64 [modules, 5] (A, B, in_scale, out_scale, bias) in elements from the buffer's
    start, -1 where absent. overrides: by module id. invocation: see `LoweredAdapter`.
    """

    buffer: torch.Tensor
    rank: np.ndarray
    scale: np.ndarray
    offsets: np.ndarray
    prefix: PackedPrefix | None = None
    overrides: Mapping[int, PackedOverride] = field(default_factory=dict)
    head: PackedHead | None = None
    invocation: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def offsets_at(self, start: int) -> np.ndarray:
        """Offsets when the arena begins at pool element `start`."""
        return np.where(self.offsets < 0, -1, self.offsets + start)


def pack(
    lowered: LoweredAdapter, modules: Mapping[str, int], packer: Packer, dtype: torch.dtype
) -> PackedAdapter:
    """Packs every tensor at its true rank. modules: id of each module name."""
    buffer = BufferBuilder(packer, dtype)
    rank = np.zeros(len(modules), np.int32)
    scale = np.zeros(len(modules), np.float32)
    offsets = np.full((len(modules), 5), -1, np.int64)
    overrides: dict[int, PackedOverride] = {}
    for name, edit in lowered.edits.items():
        module = modules[name]
        own = {word: buffer.put(tensor) for word, tensor in _own_tensors(edit, dtype).items()}
        if own:
            overrides[module] = PackedOverride(own, edit.scale)
        if edit.on_gather:
            continue
        rank[module], scale[module] = edit.rank, edit.scale
        if edit.a is not None and edit.b is not None:
            offsets[module, :2] = buffer.add_a(edit.a), buffer.add_b(edit.b)
        for column, vector in enumerate((edit.in_scale, edit.out_scale, edit.bias), start=2):
            if vector is not None:
                offsets[module, column] = buffer.add(_float32_bits(vector, dtype))
    prefix = _put_prefix(lowered, buffer, dtype)
    head = _put_head(lowered.head, buffer, dtype)
    invocation = lowered.invocation
    return PackedAdapter(buffer.build(), rank, scale, offsets, prefix, overrides, head, invocation)


def _put_head(head: Head | None, buffer: BufferBuilder, dtype: torch.dtype) -> PackedHead | None:
    if head is None:
        return None
    layers = {
        name: (
            buffer.put(layer.weight.to(dtype)),
            None if layer.bias is None else buffer.put(layer.bias.to(dtype)),
        )
        for name, layer in head.layers.items()
    }
    return PackedHead(replace(head, layers={}), layers)


def _put_prefix(
    lowered: LoweredAdapter, buffer: BufferBuilder, dtype: torch.dtype
) -> PackedPrefix | None:
    before = lowered.virtual_tokens if lowered.prefix is None else lowered.prefix
    if before is None:
        return None
    start = buffer.add(before.to(dtype).reshape(-1))
    width = before.numel() // len(before)
    return PackedPrefix(len(before), width, start, lowered.prefix is not None)


class BufferBuilder:
    """Lays tensors one after the other, each aligned, in one buffer of the pool's dtype."""

    def __init__(self, packer: Packer, dtype: torch.dtype) -> None:
        self._packer = packer
        self._dtype = dtype
        self._parts: list[tuple[int, torch.Tensor]] = []
        self._a: list[tuple[int, torch.Tensor]] = []
        self._b: list[tuple[int, torch.Tensor]] = []
        self._end = 0

    def add(self, elements: torch.Tensor) -> int:
        """elements: flat, in the pool's dtype. Returns where they begin."""
        start = self._reserve(elements.numel())
        self._parts.append((start, elements))
        return start

    def add_a(self, a: torch.Tensor) -> int:
        """a: [r, in], any float dtype. Returns where it begins, packed."""
        rank, in_size = a.shape
        start = self._reserve(self._packer.packed_a_numel(rank, in_size, self._dtype))
        self._a.append((start, a))
        return start

    def add_b(self, b: torch.Tensor) -> int:
        """b: [out, r], any float dtype. Returns where it begins, packed."""
        out, rank = b.shape
        start = self._reserve(self._packer.packed_b_numel(out, rank, self._dtype))
        self._b.append((start, b))
        return start

    def put(self, tensor: torch.Tensor) -> PackedTensor:
        """Adds the tensor's bytes, in its own dtype."""
        data = tensor.flatten().view(torch.uint8)
        padded = F.pad(data, (0, -data.numel() % self._dtype.itemsize))
        start = self.add(padded.view(self._dtype))
        return PackedTensor(start, tuple(tensor.shape), tensor.dtype)

    def build(self) -> torch.Tensor:
        buffer = kernels.empty([self._end], self._dtype, torch.device("cpu"))
        for start, elements in self._parts:
            buffer[start : start + elements.numel()] = elements
        self._packer.pack_factors_(buffer, self._a, self._b)
        return buffer

    def _reserve(self, numel: int) -> int:
        start = self._end
        align = ALIGNMENT // self._dtype.itemsize
        self._end += -(-numel // align) * align
        return start


def _float32_bits(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A vector as it lies in the pool."""
    return vector.to(torch.float32).contiguous().reshape(-1).view(dtype)


def _own_tensors(edit: ModuleEdit, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What goes beside the edit table, in the dtypes in which it is used."""
    named = {
        "weight": edit.weight,
        "own_bias": edit.own_bias,
        "token_ids": edit.token_ids,
        "token_rows": edit.token_rows,
    }
    if edit.on_gather and edit.a is not None and edit.b is not None:
        named |= {"a": edit.a.to(dtype), "b": edit.b.to(dtype), "out_scale": edit.out_scale}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
