"""The base model, adapted and attached: a flat batch of rows in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.adapters_store.head import Task
from manylora.server.engine.model.attach import LayerAttention
from manylora.server.engine.model.projection import PackedRows
from manylora.server.engine.model.step import StepInputs
from manylora.server.engine.model.tree import AdaptedTree


@dataclass(slots=True, eq=False, kw_only=True)
class AdaptedModel(AdaptedTree):
    """Hugging Face's module tree, with our twins in it.

    eos_token_ids: ids that end a generation.
    packed: modules whose weights the fused layers hold, and the head if it has its own, by name;
        empty if nothing is fused.
    """

    layers: list[LayerAttention]
    eos_token_ids: tuple[int, ...]
    packed: Mapping[str, PackedRows]

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
        return AdaptedTree.parameter(self, name)

    def run_stems(self, jobs: Sequence[tuple[Task | None, int, Tensor]]) -> list[Tensor]:
        """As `PooledModel`'s: a decoder has nothing before its heads."""
        return [rows for _, _, rows in jobs]

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
