"""Encoders: Hugging Face's tree with our twins in it, full attention, no cache.

A step's flat batch holds whole sequences. All that is done by rows is done for all of them at
once; only attention looks at each sequence by itself, so that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.bert.modeling_bert import BertPooler

from manylora.adapters_store.edits import LoweredAdapter
from manylora.adapters_store.files import CONFIG_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.head import Task
from manylora.errors import FailedPrecondition
from manylora.kernels import Plan, make_plan
from manylora.server.engine.model.attach import LayerAttention
from manylora.server.engine.model.record import check_keywords
from manylora.server.engine.model.step import VirtualRows
from manylora.server.engine.model.tree import AdaptedTree

ATTENTION = "manylora_full"
"""Our name in transformers' registry of attention functions; no mask function has it."""

SPANS = "manylora_spans"
"""Attribute of an attention module that holds the model's `Spans`."""


@dataclass(slots=True)
class Spans:
    """Where the step's sequences lie in the flat batch: first row, and row after the last."""

    spans: Sequence[tuple[int, int]] = ()


@dataclass(slots=True, frozen=True)
class EncoderInputs:
    """One step. token_ids, positions: int64 [rows]; token_types: likewise, or None for all 0;
    plan: the rows' slots; spans: see `Spans`; virtual: see `StepInputs`."""

    token_ids: Tensor
    positions: Tensor
    plan: Plan
    spans: Sequence[tuple[int, int]]
    token_types: Tensor | None = None
    virtual: VirtualRows | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class EncoderModel(AdaptedTree):
    """transformers' class for sequences or tokens, with our twins in it.

    first_position: of a sequence's first token. skips_padding: whether padding takes no position.
    """

    spans: Spans
    first_position: int
    skips_padding: bool

    @property
    def kv_layout(self) -> list[tuple[int, int]]:
        """Nothing is cached."""
        return []

    @property
    def layers(self) -> list[LayerAttention]:
        """None has a cache."""
        return []

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def type_vocab_size(self) -> int:
        """How many token types it tells apart; 0: it knows none."""
        return int(getattr(self.config, "type_vocab_size", 0))

    def lower(self, checkpoint: Checkpoint) -> LoweredAdapter:
        """The adapter's edits by names of `modules`, and its head.

        Raises InvalidArgument or FailedPrecondition if it is broken, not served or does not fit.
        """
        lowered = AdaptedTree.lower(self, checkpoint)
        if lowered.prefix is not None:
            raise FailedPrecondition(
                "keys and values before the text are not served on an encoder",
                field=f"{CONFIG_FILE}: peft_type",
                found=checkpoint.config.get("peft_type"),
                wanted="virtual tokens, or another method",
            )
        return lowered

    def positions(self, tokens: Sequence[int], virtual: int) -> list[int]:
        """Of a sequence's tokens, `virtual` of which come before the text, as transformers
        counts them."""
        if not self.skips_padding or virtual:
            return list(range(self.first_position, self.first_position + len(tokens)))
        pad, seen, positions = self.tasks.pad_token_id, 0, []
        for token in tokens:
            seen += token != pad
            positions.append(self.first_position - 1 + (seen if token != pad else 0))
        return positions

    @torch.inference_mode()
    def forward(self, inputs: EncoderInputs) -> None:
        """One step; the final hidden rows are in `step.hidden` then."""
        step = self.step
        self.spans.spans = inputs.spans
        step.virtual = inputs.virtual
        self._plan(inputs.plan)
        types = {} if inputs.token_types is None else {"token_type_ids": inputs.token_types[None]}
        self.model.base_model(
            input_ids=inputs.token_ids[None], position_ids=inputs.positions[None], **types
        )

    @torch.inference_mode()
    def run_stems(self, jobs: Sequence[tuple[Task | None, int, Tensor]]) -> list[Tensor]:
        """As `PooledModel`'s; rows of all adapters go through the base's own layers at once."""
        done = [rows for _, _, rows in jobs]
        wanting = [i for i, (task, _, _) in enumerate(jobs) if self._stem(task)]
        if not wanting:
            return done
        [stem] = {self._stem(jobs[i][0]) for i in wanting}
        counts = [len(done[i]) for i in wanting]
        slots = np.array([jobs[i][1] for i in wanting], np.int32)
        self._plan(make_plan(np.repeat(slots, counts), self.device))
        mixed = run_stem(self.model.get_submodule(stem), torch.cat([done[i] for i in wanting]))
        for i, rows in zip(wanting, torch.split(mixed, counts), strict=True):
            done[i] = rows
        return done

    def _stem(self, task: Task | None) -> str:
        form = None if task is None else self.tasks.views[task].form
        return "" if form is None else form.stem

    def _plan(self, plan: Plan) -> None:
        self.step.plan = plan
        self.step.overridden = self.step.overrides.of(plan)


class AsidePooler(BertPooler):  # type: ignore[misc]
    """BERT's pooler, which is no part of the flat batch's pass: it is run for the rows that want
    it."""

    def forward(self, hidden_states: Tensor) -> None:  # noqa: ARG002
        return None

    def run(self, rows: Tensor) -> Tensor:
        """[k, hidden] → [k, hidden]."""
        pooled: Tensor = self.activation(self.dense(rows))
        return pooled


def run_stem(stem: nn.Module, rows: Tensor) -> Tensor:
    """[k, hidden] → [k, hidden]."""
    if isinstance(stem, AsidePooler):
        return stem.run(rows)
    out: Tensor = stem(rows[None])[0]
    return out


def full_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    sliding_window: int | None = None,
    **keywords: object,
) -> tuple[Tensor, None]:
    """Every row sees all of its own sequence, or what is less than `sliding_window` away.

    A keyword that is not understood raises FailedPrecondition.

    Args:
        query, key, value: [1, heads, rows, head_dim].

    Returns:
        [1, rows, heads, head_dim], and no attention weights.
    """
    check_keywords(module, keywords)
    spans: Spans = getattr(module, SPANS)
    out = torch.empty_like(query.transpose(1, 2))
    for first, end in spans.spans:
        q, k, v = (t[:, :, first:end] for t in (query, key, value))
        mask = _near(end - first, sliding_window, query.device)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out[:, first:end] = mixed.transpose(1, 2)
    return out, None


def _near(rows: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [rows, rows]; None: all."""
    if window is None or rows <= window:
        return None
    positions = torch.arange(rows, device=device)
    return (positions[:, None] - positions).abs() < window


AttentionInterface.register(ATTENTION, full_attention)
