"""A stack of decoder layers in one call: what decoder.h describes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch

from manylora.kernels.attention import AttentionBatch
from manylora.kernels.cpu import library
from manylora.kernels.cpu.attention import Layer
from manylora.kernels.cpu.product import PackedWeight
from manylora.kernels.cpu.small import ACTIVATIONS
from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup

_decoder_layers = library.kernel("decoder_layers", "3q")


@dataclass(slots=True, frozen=True)
class DecoderProjection:
    """One packed product and the modules whose edits follow it. bias: bfloat16 [out]."""

    weight: PackedWeight
    bias: torch.Tensor | None
    group: SliceGroup


@dataclass(slots=True, frozen=True)
class DecoderLayer:
    """One layer: projections qkv, o, gate_up and down; norms before and after attention, before
    and after the MLP (bfloat16 [hidden], None where there is none), and of each head of q and of k
    (bfloat16 [head_dim], both or none); its caches, how it attends, and which of the step's rotary
    embeddings it takes.
    """

    projections: Sequence[DecoderProjection]
    norms: Sequence[torch.Tensor | None]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    attention: Layer
    rotary: int = 0


class _Projection(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("in_size", c_int64),
        ("out_size", c_int64),
        ("group", c_void_p),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("projections", _Projection * 4),
        ("norms", c_void_p * 6),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("attention", c_void_p),
        ("rotary", c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64),
        *((name, c_void_p) for name in ("x", "normed", "y", "qkv", "mixed", "gate_up", "gated")),
        *((name, c_void_p) for name in ("pool", "table", "plan", "batch", "cos", "sin")),
        ("half", c_int64),
        ("activation", c_int64),
        ("eps", c_float),
        ("offset", c_float),
    )


class DecoderLayers:
    """The layers as the kernel reads them. activation: of `ACTIVATIONS`. eps, offset: of all norms,
    as `rms_norm`'s. Raises ValueError for layers that do not fit each other."""

    def __init__(
        self, layers: Sequence[DecoderLayer], activation: str, eps: float, offset: float
    ) -> None:
        self._layers = tuple(layers)  # keeps alive what the array points at
        self._array = (_Layer * len(self._layers))(*map(_words, self._layers))
        self._fixed = (ACTIVATIONS[activation], eps, offset)
        self._rotaries = 1 + max(layer.rotary for layer in self._layers)
        groups = [p.group for layer in self._layers for p in layer.projections]
        self._max_module = max(group.max_module for group in groups)
        self._max_half = min(layer.attention.head_dim for layer in self._layers) // 2
        self._widths = _widths(self._layers[0])
        if any(_widths(layer) != self._widths for layer in self._layers):
            raise ValueError("decoder_layers: found layers of several sizes; wanted one")

    def run_(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pool: torch.Tensor,
        table: EditTable,
        plan: Plan,
        batch: AttentionBatch,
    ) -> None:
        """One step, x in place; writes the rows' keys and values. No row's adapter may scale a
        module's input: products are taken of x as it is. table has a column for each module.

        Args:
            x: bfloat16 [rows, hidden]. cos, sin: float32 [rotary embeddings, rows, half].

        Raises:
            ValueError: tensors that do not fit the layers, the plan or the batch.
        """
        rows, hidden = x.shape
        if (
            hidden != self._widths[0]
            or x.dtype != torch.bfloat16
            or not x.is_contiguous()
            or not cos.is_contiguous()
            or not sin.is_contiguous()
            or cos.shape != sin.shape
            or cos.shape[:2] != (self._rotaries, rows)
            or cos.shape[2] > self._max_half
            or cos.dtype != torch.float32
            or sin.dtype != torch.float32
            or rows != batch.rows
            or rows != plan.rows
            or plan.max_slot >= table.slots
            or (not plan.empty and self._max_module >= table.modules)
            or pool.dtype != torch.bfloat16
        ):
            raise ValueError(
                f"decoder_layers: wanted x bfloat16 [{batch.rows}, {self._widths[0]}], cos and sin "
                f"float32 [{self._rotaries}, {batch.rows}, half]; found x {tuple(x.shape)} "
                f"{x.dtype}, cos {tuple(cos.shape)} {cos.dtype}, plan of {plan.rows} rows and "
                f"slots to {plan.max_slot}, table of {table.slots} slots and {table.modules} "
                f"modules, pool {pool.dtype}"
            )
        buffers = [x.new_empty(rows, width) for width in self._widths]
        activation, eps, offset = self._fixed
        step = _Step(
            rows,
            x.data_ptr(),
            *(buffer.data_ptr() for buffer in buffers),
            pool.data_ptr(),
            table.address,
            None if plan.empty else plan.address,
            batch.address,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[2],
            activation,
            eps,
            offset,
        )
        _decoder_layers(ctypes.addressof(step), ctypes.addressof(self._array), len(self._array))


def _widths(layer: DecoderLayer) -> tuple[int, ...]:
    """Of a step's buffers. Raises ValueError for a layer whose parts do not fit each other."""
    qkv, o, gate_up, down = (p.weight for p in layer.projections)
    call, hidden = layer.attention, qkv.in_size
    wanted = (
        *((call.heads + 2 * call.kv_heads) * call.head_dim, call.heads * call.head_dim),
        *(hidden, hidden, 2 * down.in_size, hidden),
    )
    found = (qkv.out_size, o.in_size, o.out_size, gate_up.in_size, gate_up.out_size, down.out_size)
    if found != wanted:
        raise ValueError(f"decoder_layers: found sizes {found}; wanted {wanted}")
    for projection in layer.projections:
        _check(projection.bias, projection.weight.out_size)
        if projection.group.end > projection.weight.out_size:
            raise ValueError(f"decoder_layers: found {projection.group}; wanted its columns")
    for norm, size in zip(layer.norms, (*[hidden] * 4, *[call.head_dim] * 2), strict=True):
        _check(norm, size)
    block = (call.kv_heads, call.block_size, call.head_dim)
    if call.dtype != library.DTYPES[torch.bfloat16]:
        raise ValueError("decoder_layers: found attention of another dtype; wanted bfloat16")
    for cache in (layer.k_cache, layer.v_cache):
        if cache.dtype != torch.bfloat16 or cache.shape[1:] != block or not cache.is_contiguous():
            raise ValueError(
                f"decoder_layers: found {library.describe(cache=cache)}; wanted contiguous "
                f"bfloat16 [blocks, {', '.join(map(str, block))}]"
            )
    return hidden, hidden, qkv.out_size, o.in_size, gate_up.out_size, down.in_size


def _check(vector: torch.Tensor | None, size: int) -> None:
    if vector is None:
        return
    if vector.dtype != torch.bfloat16 or vector.shape != (size,) or not vector.is_contiguous():
        raise ValueError(
            f"decoder_layers: found {vector.dtype} {tuple(vector.shape)}; wanted bfloat16 [{size}]"
        )


def _words(layer: DecoderLayer) -> _Layer:
    projections = [
        _Projection(
            p.weight.panels.data_ptr(),
            _address(p.bias),
            p.weight.in_size,
            p.weight.out_size,
            p.group.address,
        )
        for p in layer.projections
    ]
    return _Layer(
        (_Projection * 4)(*projections),
        (c_void_p * 6)(*map(_address, layer.norms)),
        layer.k_cache.data_ptr(),
        layer.v_cache.data_ptr(),
        layer.attention.address,
        layer.rotary,
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
