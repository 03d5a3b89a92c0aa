"""Products over packed weights: one for all modules that read the same input, and the head's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manylora.kernels import SliceGroup
from manylora.server.engine.model.adapt import AdaptedHead, AdaptedLinear
from manylora.server.engine.model.product import MakeProduct, PlainProduct, Product
from manylora.server.engine.model.step import StepState


@dataclass(slots=True, frozen=True)
class PackedRows:
    """One module's weight and bias within a packed product."""

    product: Product
    start: int
    size: int

    def weight(self) -> Tensor:
        """[out, in], a copy or a view."""
        return self.product.weight(self.start, self.size)

    def bias(self) -> Tensor | None:
        """[out], a view; None if the module has none."""
        bias = self.product.bias
        return None if bias is None else bias.detach().narrow(0, self.start, self.size)


class Projection:
    """One product for modules that read the same x, then every row's own edits.

    [rows, in] → [rows, sum of the modules' outs]. Copies the modules' weights.
    """

    def __init__(
        self, modules: Sequence[AdaptedLinear], step: StepState, make: MakeProduct
    ) -> None:
        sizes = [module.weight.shape[0] for module in modules]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        ids = [module.group.modules[0] for module in modules]
        self.group = SliceGroup(tuple(ids), tuple(starts), tuple(sizes))
        self.step = step
        biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
        weights: list[Tensor] = [module.weight for module in modules]
        bias = torch.cat(biases) if biases else None
        self.product = make(torch.cat(weights), bias)

    def rows(self) -> list[PackedRows]:
        """Each module's part, in the order given."""
        group = self.group
        parts = zip(group.starts, group.sizes, strict=True)
        return [PackedRows(self.product, *part) for part in parts]

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
        y = self.product(x)
        for module, start, size in zip(group.modules, group.starts, group.sizes, strict=True):
            single = SliceGroup.single(module, size)
            scaled = step.kernels.scale_inputs(x, single, step.pool, step.table, step.plan)
            if scaled is not x:
                part = slice(start, start + size)
                y[:, part] = self.product(scaled)[:, part]
        return y


class FusedHead(AdaptedHead):
    """The head with a product of its own. Its weight stays in the tree if the embedding shares it,
    or if the product uses it as it is."""

    def __init__(self, head: AdaptedHead, make: MakeProduct, *, tied: bool) -> None:
        nn.Module.__init__(self)
        self.bias, self.group, self.step = head.bias, head.group, head.step
        self.packed = PackedRows(make(head.weight, head.bias), 0, len(head.weight))
        if tied or isinstance(self.packed.product, PlainProduct):
            self.weight = head.weight

    def product(self, x: Tensor) -> Tensor:
        y = self.packed.product(x.flatten(0, -2))
        return torch.unflatten(y, 0, x.shape[:-1])
