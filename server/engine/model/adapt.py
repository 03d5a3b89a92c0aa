"""Pass 1, adapt: each Linear and Conv1D becomes a twin that also applies its rows' own edits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from manylora.adapters_store.edits import ModuleKind, ModuleShape
from manylora.kernels import Plan, SliceGroup
from manylora.server.engine.model.step import StepState

KINDS: dict[type[nn.Module], ModuleKind] = {
    nn.Linear: ModuleKind.LINEAR,
    FalconLinear: ModuleKind.LINEAR,
    Conv1D: ModuleKind.CONV1D,
}
"""What can be adapted, by exact class: a subclass may compute something else."""


class AdaptedLinear(nn.Module):
    """y = W x + b, then each row's own edit. Shares W and b with the module it stands in for."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, base: Any, module_id: int, step: StepState) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.group = SliceGroup.single(module_id, shape_of(base).out_size)
        self.step = step

    def product(self, x: Tensor) -> Tensor:
        """The base's result: [..., in] → [..., out]."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, rows, in] or [rows, in], the flat batch's rows in order."""
        return self.edited(x, self.step.plan)

    def edited(self, x: Tensor, plan: Plan) -> Tensor:
        """The base's result with the plan's edits applied to the flat rows."""
        if plan.empty:
            return self.product(x)
        step = self.step
        rows = x.reshape(-1, x.shape[-1])
        scaled = step.kernels.scale_inputs(rows, self.group, step.pool, step.table, plan)
        y = self.product(scaled)
        step.kernels.apply_edits_(y, rows, self.group, step.pool, step.table, plan)
        return y.view(*x.shape[:-1], -1)


class AdaptedConv1D(AdaptedLinear):
    """GPT-2's Conv1D: a Linear whose weight lies [in, out]."""

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class AdaptedHead(AdaptedLinear):
    """The language model's head: takes the sampled rows out of the flat batch, and only those.

    Selecting here, before the product, leaves whatever the model does to its logits afterwards
    (soft-cap, scale) as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, rows, in] → [1, n, out]."""
        return self.edited(x[:, self.step.sample_rows], self.step.head_plan)


def adapt(
    model: nn.Module, names: Iterable[str], head: str, step: StepState
) -> dict[str, ModuleShape]:
    """Puts a twin in the place of each named module and of the head, in the model's tree.

    Args:
        names: modules whose input rows are exactly the flat batch's; without the head.
        head: name of the head, a plain Linear.
        step: what all twins read.

    Returns:
        The adaptable modules; a module's id is its place in the order.
    """
    modules: dict[str, ModuleShape] = {}
    for name in (*names, head):
        base = model.get_submodule(name)
        shape = shape_of(base)
        twin = AdaptedConv1D if shape.kind is ModuleKind.CONV1D else AdaptedLinear
        if name == head:
            twin = AdaptedHead
        model.set_submodule(name, twin(base, len(modules), step))
        modules[name] = shape
    return modules


def shape_of(module: Any) -> ModuleShape:
    """Kind and sizes of a module of one of `KINDS`."""
    kind = KINDS[type(module)]
    first, second = module.weight.shape
    if kind is ModuleKind.CONV1D:
        return ModuleShape(kind, in_size=first, out_size=second)
    return ModuleShape(kind, in_size=second, out_size=first)
