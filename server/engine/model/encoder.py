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

from manylora.adapters_store.head import Task
from manylora.kernels import Plan, make_plan
from manylora.server.engine.model.record import check_keywords
from manylora.server.engine.model.step import VirtualRows
from manylora.server.engine.model.tree import AdaptedTree

ATTENTION = "manylora_full"
"""Our name in transformers' registry of attention functions; no mask function has it."""

SPANS = "manylora_spans"
"""Attribute of an attention module that holds the model's `Spans`."""

LAYER = "manylora_layer"
"""Attribute of an attention module: which of the model's it is."""


@dataclass(slots=True)
class Spans:
    """Where the step's sequences lie in the flat batch: first row, and row after the last.
    prefixes: what comes before each, see `EncoderInputs`."""

    spans: Sequence[tuple[int, int]] = ()
    prefixes: Sequence[Tensor | None] = ()


@dataclass(slots=True, frozen=True)
class EncoderInputs:
    """One step. token_ids, positions: int64 [rows]; token_types: likewise, or None for all 0;
    plan: the rows' slots; spans: see `Spans`; virtual: see `StepInputs`; prefixes: for each of
    `spans` keys and values that its rows see besides their own, [n, layers, 2, heads * head_dim],
    or None."""

    token_ids: Tensor
    positions: Tensor
    plan: Plan
    spans: Sequence[tuple[int, int]]
    prefixes: Sequence[Tensor | None]
    token_types: Tensor | None = None
    virtual: VirtualRows | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class EncoderModel(AdaptedTree):
    """transformers' class for sequences or tokens, with our twins in it.

    first_position: of a sequence's first token. skips_padding: whether padding takes no position.
    kv_layout: (heads, head_dim) of each attention layer, for prefixes; nothing is cached. Empty
    where peft puts none before this model.
    """

    spans: Spans
    first_position: int
    skips_padding: bool
    kv_layout: list[tuple[int, int]]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def type_vocab_size(self) -> int:
        """How many token types it tells apart; 0: it knows none."""
        return int(getattr(self.config, "type_vocab_size", 0))

    def positions(self, tokens: Sequence[int], virtual: int, before: int = 0) -> list[int]:
        """Of a sequence's tokens, `virtual` of which come before the text, as transformers
        counts them. before: how many keys of a prefix come before all of them."""
        first = self.first_position + before
        if not self.skips_padding or virtual:
            return list(range(first, first + len(tokens)))
        pad, seen, positions = self.tasks.pad_token_id, before, []
        for token in tokens:
            seen += token != pad
            positions.append(self.first_position - 1 + (seen if token != pad else 0))
        return positions

    @torch.inference_mode()
    def forward(self, inputs: EncoderInputs) -> None:
        """One step; the final hidden rows are in `step.hidden` then."""
        step = self.step
        self.spans.spans, self.spans.prefixes = inputs.spans, inputs.prefixes
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
    """Every row sees all of its own sequence and of the prefix before it, or what is less than
    `sliding_window` away.

    A keyword that is not understood raises FailedPrecondition.

    Args:
        query, key, value: [1, heads, rows, head_dim].

    Returns:
        [1, rows, heads, head_dim], and no attention weights.
    """
    check_keywords(module, keywords)
    spans: Spans = getattr(module, SPANS)
    out = torch.empty_like(query.transpose(1, 2))
    for (first, end), prefix in zip(spans.spans, spans.prefixes, strict=True):
        q, k, v = (t[:, :, first:end] for t in (query, key, value))
        mask = _near(end - first, sliding_window, query.device)
        if prefix is not None:
            k, v = _behind(prefix[:, getattr(module, LAYER)], k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out[:, first:end] = mixed.transpose(1, 2)
    return out, None


def _behind(prefix: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """prefix: [n, 2, heads * head_dim]; key, value: [1, heads, rows, head_dim] → the same behind
    the prefix's, [1, heads, n + rows, head_dim]."""
    n, heads, size = len(prefix), key.shape[1], key.shape[3]
    before = prefix.view(n, 2, heads, size).permute(1, 2, 0, 3)[:, None]
    return torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)


def _near(rows: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [rows, rows]; None: all."""
    if window is None or rows <= window:
        return None
    positions = torch.arange(rows, device=device)
    return (positions[:, None] - positions).abs() < window


AttentionInterface.register(ATTENTION, full_attention)
