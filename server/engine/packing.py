"""A lowered adapter, packed into one host buffer, ready for one copy into its arena."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit
from manylora.adapters_store.head import Head, HeadLayer

ALIGNMENT = 64  # bytes


class Packer(Protocol):
    """The part of a kernel backend that says how A and B lie in the pool."""

    def pack_factors(
        self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, before: int
    ) -> tuple[torch.Tensor, np.ndarray]: ...


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
    buffer = BufferBuilder(dtype)
    factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
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
            factors[module] = (edit.a, edit.b)
        for column, vector in enumerate((edit.in_scale, edit.out_scale, edit.bias), start=2):
            if vector is not None:
                offsets[module, column] = buffer.add(_float32_bits(vector, dtype))
    prefix = _put_prefix(lowered, buffer, dtype)
    head = _put_head(lowered.head, buffer, dtype)
    elements, starts = packer.pack_factors(list(factors.values()), dtype, buffer.end)
    offsets[list(factors), :2] = starts
    buffer.write(elements)
    invocation = lowered.invocation
    return PackedAdapter(elements, rank, scale, offsets, prefix, overrides, head, invocation)


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
    """Lays tensors one after the other, each aligned, at the start of a buffer of the pool's dtype.

    end: how many elements they take.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: list[tuple[int, torch.Tensor]] = []
        self.end = 0

    def add(self, elements: torch.Tensor) -> int:
        """elements: flat, in the pool's dtype. Returns where they begin."""
        start = self.end
        self._parts.append((start, elements))
        align = ALIGNMENT // self._dtype.itemsize
        self.end += -(-elements.numel() // align) * align
        return start

    def put(self, tensor: torch.Tensor) -> PackedTensor:
        """Adds the tensor's bytes, in its own dtype."""
        data = tensor.flatten().view(torch.uint8)
        padded = F.pad(data, (0, -data.numel() % self._dtype.itemsize))
        start = self.add(padded.view(self._dtype))
        return PackedTensor(start, tuple(tensor.shape), tensor.dtype)

    def write(self, buffer: torch.Tensor) -> None:
        """buffer: [end or more]."""
        for start, elements in self._parts:
            buffer[start : start + elements.numel()] = elements


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
