"""What the model is told of one step, and where its modules read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.kernels import AttentionBatch, Backend, EditTable, Plan, make_batch, make_plan
from manylora.server.engine.model.overrides import NO_OVERRIDES, Overrides, StepOverrides


@dataclass(slots=True, frozen=True)
class VirtualRows:
    """Rows whose embeddings are an adapter's own: int64 [m] rows of the flat batch, and where in
    the pool each one's embedding begins, in elements."""

    rows: Tensor
    offsets: Tensor


@dataclass(slots=True)
class StepInputs:
    """One step's flat batch: rows (tokens) of many sequences, prefill chunks and decodes together.

    token_ids, positions: int64 [rows], position of a token within its own sequence.
    plan: the rows' slots. head_plan: the sampled rows' slots, in the order of sample_rows.
    attention: which rows belong to which sequence, and where their keys and values lie.
    sample_rows: int64 [n], the rows whose logits are wanted; may be empty.
    virtual: the rows that are virtual tokens (their token ids are any); None where none is.
    """

    token_ids: Tensor
    positions: Tensor
    plan: Plan
    head_plan: Plan
    attention: AttentionBatch
    sample_rows: Tensor
    virtual: VirtualRows | None = None


@dataclass(slots=True)
class StepState:
    """One model's current step and adapter memory; every adapted module of it holds this object.

    pool: [elements], the adapters' tensors. table: what lies where. overrides: what is no edit.
    The rest is the step's; overridden, head_overridden: of plan and of head_plan. hidden: [rows,
    hidden], of the base without its head, once it has run.
    """

    kernels: Backend
    pool: Tensor
    table: EditTable
    plan: Plan
    head_plan: Plan
    attention: AttentionBatch
    sample_rows: Tensor
    virtual: VirtualRows | None = None
    overrides: Overrides = field(default_factory=Overrides)
    overridden: StepOverrides = field(default_factory=lambda: NO_OVERRIDES)
    head_overridden: StepOverrides = field(default_factory=lambda: NO_OVERRIDES)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def idle(cls, kernels: Backend, dtype: torch.dtype, device: torch.device) -> StepState:
        """No adapters and no rows: what a model has until it is bound and stepped."""
        none = np.zeros(0, np.int32)
        plan = make_plan(none, device)
        return cls(
            kernels=kernels,
            pool=torch.empty(0, dtype=dtype, device=device),
            table=EditTable(0, 0, device),
            plan=plan,
            head_plan=plan,
            attention=make_batch(none, none, np.zeros((0, 1), np.int32), 1, device),
            sample_rows=torch.zeros(0, dtype=torch.int64, device=device),
        )

    def take(self, inputs: StepInputs) -> None:
        """Makes `inputs` the current step."""
        self.plan = inputs.plan
        self.head_plan = inputs.head_plan
        self.attention = inputs.attention
        self.sample_rows = inputs.sample_rows
        self.virtual = inputs.virtual
        self.overridden = self.overrides.of(inputs.plan)
        self.head_overridden = self.overrides.of(inputs.head_plan)

    def put_virtual(self, embedded: Tensor) -> None:
        """Puts the virtual tokens' embeddings in their rows. embedded: [1, rows, width]."""
        if self.virtual is not None:
            width = torch.arange(embedded.shape[-1], device=embedded.device)
            embedded[0, self.virtual.rows] = self.pool[self.virtual.offsets[:, None] + width]


def keep_hidden(model: PreTrainedModel, step: StepState) -> None:
    """From now on, `step.hidden` is what the last forward pass of the model's base gave."""

    def keep(module: nn.Module, args: object, output: Any) -> None:  # noqa: ARG001
        step.hidden = output[0][0]

    for module in {model.base_model, model.get_decoder()}:  # OPT calls the inner one itself
        module.register_forward_hook(keep)
