"""Products over packed weights: one for all modules that read the same input, and the head's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manylora.kernels import SliceGroup, cpu
from manylora.server.engine.model.adapt import AdaptedHead, AdaptedLinear
from manylora.server.engine.model.step import StepState


@dataclass(slots=True, frozen=True)
class PackedRows:
    """One module's weight and bias within a packed product."""

    projection: Projection
    start: int
    size: int

    def weight(self) -> Tensor:
        """[out, in], a copy or a view."""
        return self.projection.product.weight(self.start, self.size)

    def bias(self) -> Tensor | None:
        """[out], a view; None if the module has none."""
        bias = self.projection.product.bias
        return None if bias is None else bias.detach().narrow(0, self.start, self.size)


class Projection:
    """One product for modules that read the same x, then every row's own edits.

    [rows, in] → [rows, sum of the modules' outs]. Copies the modules' weights.
    """

    def __init__(
        self, modules: Sequence[AdaptedLinear], step: StepState, arena: cpu.HugeArena
    ) -> None:
        sizes = [module.weight.shape[0] for module in modules]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        ids = [module.group.modules[0] for module in modules]
        self.group = SliceGroup(tuple(ids), tuple(starts), tuple(sizes))
        self.step = step
        biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
        weights: list[Tensor] = [module.weight for module in modules]
        bias = torch.cat(biases) if biases else None
        self.product = PackedProduct(torch.cat(weights), bias, arena)

    def rows(self) -> list[PackedRows]:
        """Each module's part, in the order given."""
        group = self.group
        return [PackedRows(self, *at) for at in zip(group.starts, group.sizes, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        step = self.step
        if step.plan.empty:
            return self.product(x)
        y = self._scaled(x) if step.table.scales_inputs(self.group) else self.product(x)
        if step.overridden:
            self._override_(y, x)
        step.kernels.apply_edits_(y, x, self.group, step.pool, step.table, step.plan)
        return y

    def _override_(self, y: Tensor, x: Tensor) -> None:
        """The adapters' own products in the place of the base's."""
        group = self.group
        for module, start, size in zip(group.modules, group.starts, group.sizes, strict=True):
            part = y[:, start : start + size]
            for where, own in self.step.overridden.get(module, ()):
                part[where] = own.multiply(part[where], x[where])

    def _scaled(self, x: Tensor) -> Tensor:
        """The product where modules of the group may scale their inputs, each in its own way."""
        step, group = self.step, self.group
        parts = []
        for module, start, size in zip(group.modules, group.starts, group.sizes, strict=True):
            single = SliceGroup.single(module, size)
            scaled = step.kernels.scale_inputs(x, single, step.pool, step.table, step.plan)
            parts.append(self.product(scaled)[:, start : start + size])
        return torch.cat(parts, dim=1)


class PackedProduct:
    """x [rows, in] → x W^T + b, by our own kernel where it can pack the weight [out, in], else
    torch's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, arena: cpu.HugeArena) -> None:
        self.bias = bias
        self.in_size = weight.shape[1]
        self.packed = cpu.PackedWeight(weight, arena) if cpu.packs(weight) else None
        self._plain = None if self.packed else weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        if self._plain is None:
            assert self.packed is not None
            return cpu.linear(x, self.packed, self.bias)
        return F.linear(x, self._plain, self.bias)

    def weight(self, start: int, size: int) -> Tensor:
        """Rows of the weight: [size, in], a copy or a view."""
        if self._plain is None:
            assert self.packed is not None
            return self.packed.unpack(start, size)
        return self._plain.narrow(0, start, size)


class FusedHead(AdaptedHead):
    """The head with a packed weight."""

    def __init__(self, head: AdaptedHead, arena: cpu.HugeArena) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = head.weight, head.bias
        self.group, self.step = head.group, head.step
        self._product = PackedProduct(head.weight, head.bias, arena)

    def product(self, x: Tensor) -> Tensor:
        return torch.unflatten(self._product(x.flatten(0, -2)), 0, x.shape[:-1])
