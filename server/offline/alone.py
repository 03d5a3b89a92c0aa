"""One adapter and one prompt on the model that serves, without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from manylora import kernels
from manylora.adapters_store.head import Head, Task
from manylora.kernels import EditTable, make_plan
from manylora.server.engine.blocks import BlockList
from manylora.server.engine.encoder_runner import run_encoder_step
from manylora.server.engine.invocation import acts_from
from manylora.server.engine.model import AdaptedModel, EncoderModel
from manylora.server.engine.packing import PackedAdapter
from manylora.server.engine.pool import Arena
from manylora.server.engine.pooling import pool_rows
from manylora.server.engine.prefix import Prefix, write_prefix
from manylora.server.engine.runner import step_inputs
from manylora.server.engine.scheduler import Chunk
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import (
    AdapterKey,
    PooledTask,
    Pooling,
    Request,
    SamplingParams,
)

BLOCK = 16
_POOLED = {Task.SEQ_CLS: PooledTask.CLASSIFY, Task.TOKEN_CLS: PooledTask.CLASSIFY_TOKENS}


@torch.inference_mode()
def run_alone(
    model: AdaptedModel | EncoderModel, packed: PackedAdapter, task: Task, ids: Seq[int]
) -> Tensor:
    """What is served for a prompt; as `peft_side.run_peft` answers.

    model: of whose pool and cache nothing is kept.
    """
    pool = packed.buffer.to(model.device)
    table = EditTable(1, len(model.modules), model.device)
    table.write(0, packed.rank, packed.scale, packed.offsets_at(0))
    model.step.overrides.write(0, packed.overrides, pool, 0)
    model.bind(pool, table)
    sequence = _sequence(packed, task, ids)
    prefix = None if packed.prefix is None else Prefix(packed.prefix, Arena(0, len(pool)))
    if isinstance(model, EncoderModel):
        sequence.prepend_rows(prefix)
        chunk = Chunk(sequence, 0, len(sequence.tokens))
        run_encoder_step(model, [chunk], model.device)
        logits = model.step.hidden
    else:
        sequence.prepend(prefix)
        chunk = _attend(model, sequence)
        logits = _forward(model, chunk)
    if task is Task.CAUSAL_LM:
        return logits.cpu()
    if task is Task.FEATURE_EXTRACTION:
        return model.step.hidden[-len(ids) :].float().cpu()
    [(_, values)] = pool_rows(model, [chunk], lambda _: _head(packed, pool))
    return values.cpu()


def _sequence(packed: PackedAdapter, task: Task, ids: Seq[int]) -> Sequence:
    request = Request(
        id="alone",
        prompt=list(ids),
        sampling=SamplingParams(),
        adapter=AdapterKey("alone", "alone"),
        pooling=Pooling(_POOLED[task]) if task in _POOLED else None,
    )
    sequence = Sequence.start(request, frozenset())
    sequence.slot = 0
    sequence.acts_from = acts_from(packed.invocation, ids)
    return sequence


def _attend(model: AdaptedModel, sequence: Sequence) -> Chunk:
    """Gives the sequence a cache of its own; the rows that are to be run."""
    blocks = list(range(-(-len(sequence.tokens) // BLOCK)))
    sequence.blocks = BlockList("alone", blocks)
    shapes = [(len(blocks), heads, BLOCK, dim) for heads, dim in model.kv_layout]
    empty = [kernels.empty(shape, model.dtype, model.device) for shape in shapes for _ in "kv"]
    model.attach_cache(list(zip(empty[::2], empty[1::2], strict=True)))
    start = 0
    if sequence.prefix is not None and sequence.prefix.packed.keys_values:
        start = sequence.prefix_tokens
        write_prefix(model, BLOCK, sequence.prefix, blocks, 0)
    return Chunk(sequence, start, len(sequence.tokens) - start)


def _forward(model: AdaptedModel, chunk: Chunk) -> Tensor:
    """Logits of all rows that are the prompt's."""
    inputs = step_inputs([chunk], BLOCK, model.device)
    own = max(0, chunk.sequence.prefix_tokens - chunk.start)
    rows = torch.arange(own, chunk.count)
    slots = torch.where(rows < chunk.sequence.acts_from, -1, 0).to(torch.int32)
    plan = make_plan(slots.numpy(), model.device)
    inputs = replace(inputs, sample_rows=rows.to(model.device), head_plan=plan)
    return model.forward(inputs)


def _head(packed: PackedAdapter, pool: Tensor) -> Head | None:
    return None if packed.head is None else packed.head.view(pool, 0)
