"""What the model is told of one step, and where its modules read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manylora.kernels import AttentionBatch, Backend, EditTable, Plan, make_batch, make_plan


@dataclass(slots=True)
class StepInputs:
    """One step's flat batch: rows (tokens) of many sequences, prefill chunks and decodes together.

    token_ids, positions: int64 [rows], position of a token within its own sequence.
    plan: the rows' slots. head_plan: the sampled rows' slots, in the order of sample_rows.
    attention: which rows belong to which sequence, and where their keys and values lie.
    sample_rows: int64 [n], the rows whose logits are wanted; may be empty.
    """

    token_ids: Tensor
    positions: Tensor
    plan: Plan
    head_plan: Plan
    attention: AttentionBatch
    sample_rows: Tensor


@dataclass(slots=True)
class StepState:
    """One model's current step and adapter memory; every adapted module of it holds this object.

    pool: [elements], the adapters' tensors. table: what lies where. The rest is the step's.
    """

    kernels: Backend
    pool: Tensor
    table: EditTable
    plan: Plan
    head_plan: Plan
    attention: AttentionBatch
    sample_rows: Tensor

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
