"""What a decoder and an encoder share once Hugging Face's tree has our twins in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from manylora.adapters_store.edits import LoweredAdapter, ModuleShape
from manylora.adapters_store.format import Checkpoint
from manylora.kernels import EditTable
from manylora.server.engine.model.step import StepState
from manylora.server.engine.model.task_view import TaskBase, lower_for


@dataclass(slots=True, eq=False, kw_only=True)
class AdaptedTree:
    """Used by one thread.

    modules: what an adapter may edit, by name in the tree; a module's id is its place.
    max_context: tokens that a sequence may have, with its answer if it has one.
    tasks: what it is to requests that want no text.
    """

    model: PreTrainedModel
    step: StepState
    modules: dict[str, ModuleShape]
    vocab_size: int
    max_context: int
    tasks: TaskBase

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def embedding_width(self) -> int:
        """Of what the model's input embedding gives, and of a virtual token."""
        width: int = self.model.get_input_embeddings().weight.shape[1]
        return width

    def parameter(self, name: str) -> Tensor | None:
        """A parameter of the base by its name in the tree, or None. Not to be changed."""
        module, _, leaf = name.rpartition(".")
        try:
            parameter = getattr(self.model.get_submodule(module), leaf)
        except AttributeError:
            return None
        return parameter if isinstance(parameter, Tensor) else None

    def lower(self, checkpoint: Checkpoint) -> LoweredAdapter:
        """The adapter's edits by names of `modules`, and its head.

        Raises InvalidArgument or FailedPrecondition if it is broken, not served or does not fit.
        """
        return lower_for(checkpoint, self.tasks, self.parameter)

    def bind(self, pool: Tensor, table: EditTable) -> None:
        """Says where the adapters' tensors lie. pool: [elements] in the model's dtype; table: a
        column for each of `modules`."""
        self.step.pool = pool
        self.step.table = table
