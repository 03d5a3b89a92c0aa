"""The base model, adapted and attached: a flat batch of rows in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from manylora.adapters_store.edits import LoweredAdapter, ModuleShape
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.head import Task
from manylora.kernels import EditTable
from manylora.server.engine.model.attach import LayerAttention
from manylora.server.engine.model.fuse import PackedRows
from manylora.server.engine.model.step import StepInputs, StepState
from manylora.server.engine.model.task_view import TaskBase, lower_for


@dataclass(slots=True, eq=False)
class AdaptedModel:
    """Hugging Face's module tree, with our twins in it. Used by one thread.

    modules: what an adapter may edit, by name in the tree; a module's id is its place.
    max_context: tokens that a sequence may have, prompt and answer.
    eos_token_ids: ids that end a generation.
    packed: modules whose weights the fused layers hold, by name; empty if nothing is fused.
    tasks: what it is to requests that want no text.
    """

    model: PreTrainedModel
    step: StepState
    layers: list[LayerAttention]
    modules: dict[str, ModuleShape]
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    packed: Mapping[str, PackedRows]
    tasks: TaskBase

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def embedding_width(self) -> int:
        """Of what the model's input embedding gives, and of a virtual token."""
        width: int = self.model.get_input_embeddings().weight.shape[1]
        return width

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def kv_layout(self) -> list[tuple[int, int]]:
        """(kv_heads, head_dim) of each attention layer, in the order of `attach_cache`."""
        return [(layer.call.kv_heads, layer.call.head_dim) for layer in self.layers]

    def parameter(self, name: str) -> Tensor | None:
        """A parameter of the base by its name in the tree, or None. Not to be changed."""
        module, _, leaf = name.rpartition(".")
        if module in self.packed:
            rows = self.packed[module]
            return {"weight": rows.weight, "bias": rows.bias}.get(leaf, lambda: None)()
        try:
            parameter = getattr(self.model.get_submodule(module), leaf)
        except AttributeError:
            return None
        return parameter if isinstance(parameter, Tensor) else None

    def lower(self, checkpoint: Checkpoint) -> LoweredAdapter:
        """The adapter's edits by names of `modules`, and its head.

        Raises InvalidArgument or FailedPrecondition if it is broken, not served or does not fit.
        """
        return lower_for(checkpoint, self.tasks.views, self.parameter)

    def run_stems(self, jobs: Sequence[tuple[Task | None, int, Tensor]]) -> list[Tensor]:
        """As `PooledModel`'s: a decoder has nothing before its heads."""
        return [rows for _, _, rows in jobs]

    def bind(self, pool: Tensor, table: EditTable) -> None:
        """Says where the adapters' tensors lie. pool: [elements] in the model's dtype; table: a
        column for each of `modules`."""
        self.step.pool = pool
        self.step.table = table

    def attach_cache(self, caches: list[tuple[Tensor, Tensor]]) -> None:
        """Gives each layer its k_cache, v_cache [blocks, kv_heads, block_size, head_dim]."""
        for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> Tensor:
        """One step. Writes the rows' keys and values into the cache.

        Returns:
            float32 [n, vocab], logits of `inputs.sample_rows`.
        """
        self.step.take(inputs)
        output = self.model(
            input_ids=inputs.token_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
        )
        logits: Tensor = output.logits[0].float()
        return logits
