"""The base's products on the CPU: weights packed once, for product.cpp."""

from __future__ import annotations

import torch

from manylora.kernels.cpu import library
from manylora.kernels.cpu.memory import HugeArena

_PANEL = 16
_DEPTH = 32

_linear = library.kernel("linear", "4q")


class PackedWeight:
    """A weight [out, in] as the product streams it: panels of 16 outputs, [in / 2][16][2] each, the
    last one padded with zeros.

    panels: bfloat16 [ceil(out / 16), in / 2, 16, 2], in huge pages. out_size, in_size.
    """

    def __init__(self, weight: torch.Tensor, arena: HugeArena) -> None:
        self.out_size, self.in_size = weight.shape
        count = -(-self.out_size // _PANEL)
        self.panels = arena.empty((count, self.in_size // 2, _PANEL, 2), torch.bfloat16)
        whole = self.out_size // _PANEL
        self._fill(self.panels[:whole], weight[: whole * _PANEL])
        if whole < count:
            last = weight.new_zeros((_PANEL, self.in_size))
            last[: self.out_size - whole * _PANEL] = weight[whole * _PANEL :]
            self._fill(self.panels[whole:], last)

    def _fill(self, panels: torch.Tensor, weight: torch.Tensor) -> None:
        if not weight.is_contiguous() or weight.storage_offset() % 2:
            weight = weight.clone(memory_format=torch.contiguous_format)
        pairs = weight.view(torch.int32).view(-1, _PANEL, self.in_size // 2)
        panels.view(torch.int32).squeeze(-1).copy_(pairs.transpose(1, 2))

    def unpack(self, start: int = 0, size: int | None = None) -> torch.Tensor:
        """Rows of the weight again: a copy, [size, in]."""
        end = self.out_size if size is None else start + size
        first = start // _PANEL
        panels = self.panels[first : -(-end // _PANEL)]
        rows = panels.transpose(1, 2).reshape(-1, self.in_size)
        return rows[start - first * _PANEL : end - first * _PANEL]


def packs(weight: torch.Tensor) -> bool:
    """Whether `PackedWeight` can be made of a weight [out, in], and multiplied on this machine."""
    return (
        library.available()
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] > 0
        and weight.shape[1] % _DEPTH == 0
    )


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias, summed in float32 and rounded once.

    A row's bits do not depend on the other rows.

    Args:
        x: bfloat16 [rows, in], may have a row stride. bias: bfloat16 [out].

    Raises:
        ValueError: tensors that do not fit each other.
    """
    y = x.new_empty(x.numel() // weight.in_size, weight.out_size)
    shift = 0 if bias is None else bias._cdata
    if not _linear(y._cdata, x._cdata, weight.panels._cdata, shift):
        raise ValueError(
            f"linear: wanted x bfloat16 [rows, {weight.in_size}] with contiguous rows and a bias "
            f"bfloat16 [{weight.out_size}], contiguous; found {library.describe(x=x, bias=bias)}"
        )
    return y
