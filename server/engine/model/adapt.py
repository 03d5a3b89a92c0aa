"""Pass 1, adapt: modules become twins that also do what their rows' adapters do to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from manylora.adapters_store.edits import ModuleKind, ModuleShape
from manylora.kernels import Plan, SliceGroup
from manylora.server.engine.model import quantised
from manylora.server.engine.model.overrides import StepOverrides
from manylora.server.engine.model.step import StepState

KINDS: dict[type[nn.Module], ModuleKind] = {
    nn.Linear: ModuleKind.LINEAR,
    FalconLinear: ModuleKind.LINEAR,
    Conv1D: ModuleKind.CONV1D,
}
"""What can be adapted, by exact class: a subclass may compute something else."""


def linear_kind(module: nn.Module) -> ModuleKind | None:
    """Of a linear module that can be adapted; else None."""
    return ModuleKind.QUANTISED if quantised.is_quantised(module) else KINDS.get(type(module))


class AdaptedProduct(nn.Module):
    """The base's product with a weight, then each row's own edit."""

    def __init__(self, base: Any, module_id: int, step: StepState) -> None:
        super().__init__()
        self.group = SliceGroup.single(module_id, shape_of(base).out_size)
        self.step = step

    def product(self, x: Tensor) -> Tensor:
        """The base's result: [..., in] → [..., out]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, rows, in] or [rows, in], the flat batch's rows in order."""
        return self.edited(x, self.step.plan, self.step.overridden)

    def edited(self, x: Tensor, plan: Plan, overridden: StepOverrides) -> Tensor:
        """The base's result with the plan's edits applied to the flat rows."""
        if plan.empty:
            return self.product(x)
        step = self.step
        rows = x.reshape(-1, x.shape[-1])
        scaled = step.kernels.scale_inputs(rows, self.group, step.pool, step.table, plan)
        y = self.product(scaled)
        if overridden:
            for where, own in overridden.get(self.group.modules[0], ()):
                y[where] = own.multiply(y[where], rows[where])
        step.kernels.apply_edits_(y, rows, self.group, step.pool, step.table, plan)
        return y.view(*x.shape[:-1], -1)


class AdaptedLinear(AdaptedProduct):
    """y = W x + b. Shares W and b with the module it stands in for."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, base: Any, module_id: int, step: StepState) -> None:
        super().__init__(base, module_id, step)
        self.weight = base.weight
        self.bias = base.bias

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class AdaptedQuantised(AdaptedProduct):
    """bitsandbytes' linear module, which computes the product itself."""

    def __init__(self, base: Any, module_id: int, step: StepState) -> None:
        super().__init__(base, module_id, step)
        self.bias = base.bias
        self._base = (base,)  # a tuple keeps it out of the tree

    @property
    def weight(self) -> Tensor:
        """float32 [out, in], made anew."""
        return quantised.weight(*self._base)

    def product(self, x: Tensor) -> Tensor:
        return quantised.product(*self._base, x)


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
        step = self.step
        return self.edited(x[:, step.sample_rows], step.head_plan, step.head_overridden)


class AdaptedNorm(nn.Module):
    """A norm whose weight and bias may be those of a row's adapter. Shares the base's."""

    def __init__(self, base: nn.Module, module_id: int, step: StepState) -> None:
        super().__init__()
        for name, parameter in base.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._base = (base,)  # a tuple keeps it out of the tree
        self.module_id = module_id
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, n], [1, rows, n] or [1, rows, heads, n]."""
        [base] = self._base
        y: Tensor = base(x)
        if self.step.overridden:
            axis = 0 if x.dim() == 2 else 1
            for where, own in self.step.overridden.get(self.module_id, ()):
                rows = x.index_select(axis, where)
                y.index_copy_(axis, where, functional_call(base, own.parameters(), (rows,)))
        return y


class AdaptedEmbedding(nn.Module):
    """The input embedding; rows may have their adapter's own. Shares the base's weight."""

    def __init__(self, base: Any, module_id: int, step: StepState) -> None:
        super().__init__()
        self.weight = base.weight
        self.factor = embedding_factor(base)
        self._base = (base,)  # a tuple keeps it out of the tree
        self.module_id = module_id
        self.step = step

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [1, rows] → [1, rows, hidden]."""
        [base] = self._base
        y: Tensor = base(ids)
        if self.step.overridden:
            for where, own in self.step.overridden.get(self.module_id, ()):
                y[0, where] = own.embed(y[0, where], ids[0, where], self.factor)
        self.step.put_virtual(y)
        return y


def adapt(
    model: PreTrainedModel,
    names: Iterable[str],
    head: str | None,
    others: Iterable[str],
    step: StepState,
) -> dict[str, ModuleShape]:
    """Puts a twin in the place of each named module and of the head, in the model's tree.

    Args:
        names: modules whose input rows are exactly the flat batch's; without the head.
        head: name of the head, a plain Linear; None: there is none.
        others: norms, and the input embedding, whose rows are the batch's.
        step: what all twins read.

    Returns:
        The adaptable modules; a module's id is its place in the order.
    """
    embedding = model.get_input_embeddings().weight
    modules: dict[str, ModuleShape] = {}
    for name in (*names, *([head] if head else ()), *others):
        base = model.get_submodule(name)
        shape = shape_of(base)
        if name == head:
            shape = replace(shape, tied=base.weight is embedding)
        twin = AdaptedHead if name == head else _TWINS[shape.kind]
        model.set_submodule(name, twin(base, len(modules), step))
        modules[name] = shape
    return modules


_TWINS: dict[ModuleKind, Callable[[Any, int, StepState], nn.Module]] = {
    ModuleKind.LINEAR: AdaptedLinear,
    ModuleKind.CONV1D: AdaptedConv1D,
    ModuleKind.QUANTISED: AdaptedQuantised,
    ModuleKind.NORM: AdaptedNorm,
    ModuleKind.EMBEDDING: AdaptedEmbedding,
}


def shape_of(module: Any) -> ModuleShape:
    """Kind and sizes of a module that `linear_kind` knows, of an embedding or of a norm."""
    if quantised.is_quantised(module):
        return ModuleShape(ModuleKind.QUANTISED, module.in_features, module.out_features)
    if module.weight.dim() == 1:
        return ModuleShape(ModuleKind.NORM, len(module.weight), len(module.weight))
    first, second = module.weight.shape
    if isinstance(module, nn.Embedding):
        return ModuleShape(ModuleKind.EMBEDDING, in_size=first, out_size=second)
    kind = KINDS[type(module)]
    if kind is ModuleKind.CONV1D:
        return ModuleShape(kind, in_size=first, out_size=second)
    return ModuleShape(kind, in_size=second, out_size=first)


def embedding_factor(embedding: Any) -> float:
    """What the module multiplies its rows by (Gemma 3), in its own dtype."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return float(torch.as_tensor(scale).to(embedding.weight.dtype))
