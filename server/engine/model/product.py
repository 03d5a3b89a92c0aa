"""One product x W^T + b over fixed weights, by whichever kernel holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.errors import FailedPrecondition
from manylora.kernels import cpu


class Product(Protocol):
    """x [rows, in] → [rows, out], in x's dtype.

    bias: [out] or None.
    """

    in_size: int
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor: ...

    def weight(self, start: int, size: int) -> Tensor:
        """Rows of the weight: [size, in], a copy or a view."""
        ...


MakeProduct = Callable[[Tensor, Tensor | None], Product]
"""Of a weight [out, in] and a bias [out], which it may copy."""


class PlainProduct:
    """torch's, whose bits of a row may depend on how many rows there are."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.in_size = weight.shape[1]
        self._weight = weight  # the parameter itself, whose data moves once the model is loaded

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self.bias)

    def weight(self, start: int, size: int) -> Tensor:
        return self._weight.detach().narrow(0, start, size)


class PackedProduct:
    """Our own kernel's, of bfloat16 weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, arena: cpu.HugeArena) -> None:
        self.bias = bias
        self.in_size = weight.shape[1]
        self.packed = cpu.PackedWeight(weight, arena)

    def __call__(self, x: Tensor) -> Tensor:
        return cpu.linear(x, self.packed, self.bias)

    def weight(self, start: int, size: int) -> Tensor:
        return self.packed.unpack(start, size)


class Int8Product:
    """oneDNN's of 8-bit integers: each output's weights and each row of x have a scale of their
    own, the largest size / 127. The sums are exact integers where `int8_is_exact`; the rest is
    rounded in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        self.in_size = weight.shape[1]
        self._dtype = weight.dtype
        ints, scales = quantise(weight.detach())
        self._scales = scales[:, 0].contiguous()
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(ints, None)

    def __call__(self, x: Tensor) -> Tensor:
        ints, scales = quantise(x)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(ints, 1.0, 0, self._packed, self._scales, self._zeros),
            *(None, 1.0, 0, torch.float32, "none", [], ""),  # bias, output scale, dtype, what after
        )
        y *= scales
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)

    def weight(self, start: int, size: int) -> Tensor:
        part = slice(start, start + size)
        weight: Tensor = self._packed.to_dense()[:, part].T * self._scales[part, None]
        return weight.to(self._dtype)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to the nearest of 255 steps: int8 [rows, n], scales float32 [rows, 1]."""
    scales = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-30) / 127
    return (x.float() / scales).round_().to(torch.int8), scales


def exact_products() -> MakeProduct:
    """Packed where our kernel takes the weight, else plain; all in one arena."""
    arena = cpu.HugeArena()

    def make(weight: Tensor, bias: Tensor | None) -> Product:
        if cpu.packs(weight):
            return PackedProduct(weight, bias, arena)
        return PlainProduct(weight, bias)

    return make


def int8_is_exact() -> bool:
    """Whether oneDNN's sums are right here: without VNNI, sums of two products pass 16 bits."""
    x, weight = torch.ones(32, 576), torch.ones(48, 576)
    weight[1::2] = -1
    return torch.allclose(Int8Product(weight, None)(x), x @ weight.T, rtol=1e-4)


def int8_products(device: torch.device) -> MakeProduct:
    """Raises FailedPrecondition where torch has no such product, or a wrong one."""
    if device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        raise FailedPrecondition(
            "8-bit weights need a CPU and a torch with oneDNN's quantised product",
            field="quantization",
            found=f"{device.type}, torch {torch.__version__}",
        )
    if not int8_is_exact():
        raise FailedPrecondition(
            "8-bit weights need a CPU whose products of 8-bit integers are exact (AVX-VNNI, "
            "AVX512-VNNI or AMX): this one's pass the 16 bits that oneDNN sums them in",
            field="quantization",
            found=f"torch's {torch.backends.cpu.get_cpu_capability()}",
        )
    return Int8Product
