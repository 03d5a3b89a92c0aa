"""Requests that want no text: classes or embeddings, from the final hidden rows of their prompt.

Such a request is a prefill. Each step, the rows that it needs are taken out of the batch's hidden
rows; with its last row, or for classes of tokens with every chunk, they go through the head of its
adapter, which lies in the adapter's arena.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.adapters_store.head import Head, Problem, Task
from manylora.errors import FailedPrecondition
from manylora.server.engine.model import PooledModel
from manylora.server.engine.scheduler import Chunk
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import AdapterKey, Pooled, PooledTask, Rows

HeadOf = Callable[[AdapterKey | None], Head | None]
"""A resident adapter's head, its tensors in the pool; for None the base's own."""

_TASKS = {PooledTask.CLASSIFY: Task.SEQ_CLS, PooledTask.CLASSIFY_TOKENS: Task.TOKEN_CLS}


def check_task(sequence: Sequence, head: Head | None) -> FailedPrecondition | None:
    """Why the adapter, or without one the base, cannot do what the request wants.

    head: the adapter's own, or the base's.
    """
    pooling, adapter = sequence.request.pooling, sequence.request.adapter
    found = Task.CAUSAL_LM if head is None else head.task
    if pooling is None:
        wanted = None if found is Task.CAUSAL_LM else Task.CAUSAL_LM
    else:
        wanted = _TASKS.get(pooling.task)
    if wanted in (None, found):
        return None
    what = "the base has no head for this" if adapter is None else "it was trained for another task"
    return FailedPrecondition(what, field="adapter", found=found.value, wanted=wanted.value)


def rows_wanted(sequence: Sequence, model: PooledModel) -> tuple[range, Rows]:
    """The positions whose hidden rows the request needs, among `sequence.tokens`, and how."""
    how = _rows_of(sequence, model)
    own, end = sequence.prefix_tokens, len(sequence.tokens)
    embedded = sequence.prefix is not None and not sequence.prefix.packed.keys_values
    pooling = sequence.request.pooling
    assert pooling is not None
    # transformers' classifiers do not tell virtual tokens from those of the text
    first = 0 if embedded and pooling.task is PooledTask.CLASSIFY else own
    match how:
        case Rows.FIRST:
            return range(first, first + 1), how
        case Rows.LAST_UNPADDED if not embedded:
            last = _last_unpadded(sequence.tokens[own:], model.tasks.pad_token_id)
            return range(own + last, own + last + 1), how
        case Rows.LAST | Rows.LAST_UNPADDED:
            return range(end - 1, end), how
        case _:
            return range(first, end), how


def _rows_of(sequence: Sequence, model: PooledModel) -> Rows:
    pooling = sequence.request.pooling
    assert pooling is not None
    if pooling.task is PooledTask.EMBED:
        return pooling.rows or model.tasks.embedding
    form = model.tasks.views[_TASKS[pooling.task]].form
    assert form is not None
    return form.rows


def _last_unpadded(tokens: Seq[int], pad: int | None) -> int:
    """As transformers' classifiers find it: 0 where all is padding."""
    if pad is None:
        return len(tokens) - 1
    return next((i for i in range(len(tokens) - 1, 0, -1) if tokens[i] != pad), 0)


def pool_rows(
    model: PooledModel, chunks: Seq[Chunk], head_of: HeadOf
) -> list[tuple[Sequence, Tensor]]:
    """Takes in one step: what the requests that end with it wanted, float32 [n, size].

    model: has just run `chunks`.
    """
    jobs: list[tuple[Sequence, Tensor]] = []
    start = 0
    for chunk in chunks:
        if chunk.sequence.request.pooling is not None:
            rows = _gather(chunk, model.step.hidden[start : start + chunk.count], model)
            if len(rows):
                jobs.append((chunk.sequence, rows))
        start += chunk.count
    for (sequence, _), values in zip(jobs, _run_heads(model, jobs, head_of), strict=True):
        sequence.gathered.outputs.append(values)
    return [
        (chunk.sequence, torch.cat(chunk.sequence.gathered.outputs))
        for chunk in chunks
        if chunk.ends_pooled
    ]


def _gather(chunk: Chunk, hidden: Tensor, model: PooledModel) -> Tensor:
    """The rows [k, hidden] that are ready for a head. hidden: the chunk's."""
    sequence = chunk.sequence
    wanted, how = rows_wanted(sequence, model)
    first, end = max(wanted.start, chunk.start), min(wanted.stop, chunk.start + chunk.count)
    rows = hidden[max(0, first - chunk.start) : max(0, end - chunk.start)]
    if how is not Rows.MEAN:
        return rows
    gathered = sequence.gathered
    part = rows.float().sum(dim=0, keepdim=True)
    gathered.total = part if gathered.total is None else gathered.total + part
    if chunk.start + chunk.count < wanted.stop:
        return rows[:0]
    return (gathered.total / len(wanted)).to(hidden.dtype)


def _run_heads(
    model: PooledModel, jobs: Seq[tuple[Sequence, Tensor]], head_of: HeadOf
) -> list[Tensor]:
    """float32 [k, size] of each job's rows [k, hidden]."""
    tasks = [_task(sequence) for sequence, _ in jobs]
    stemmed = model.run_stems(
        [(task, sequence.slot, rows) for task, (sequence, rows) in zip(tasks, jobs, strict=True)]
    )
    values = []
    for task, (sequence, _), rows in zip(tasks, jobs, stemmed, strict=True):
        if task is None:
            values.append(_embedding(sequence, rows))
            continue
        head, form = head_of(sequence.request.adapter), model.tasks.views[task].form
        assert head is not None and form is not None
        values.append(form.logits(head, rows))
    return values


def _task(sequence: Sequence) -> Task | None:
    pooling = sequence.request.pooling
    assert pooling is not None
    return _TASKS.get(pooling.task)


def _embedding(sequence: Sequence, rows: Tensor) -> Tensor:
    pooling = sequence.request.pooling
    rows = rows.float()
    if pooling is not None and pooling.normalize:
        rows = F.normalize(rows)
    return rows


def describe(sequence: Sequence, values: Tensor, model: PooledModel, head: Head | None) -> Pooled:
    """values: float32 [n, size], finite. head: the request's."""
    if _task(sequence) is None or head is None:
        return Pooled(values.cpu().numpy(), (), None, sequence.usage())
    count = values.shape[1]
    labels, problem = head.labels, head.problem
    if len(model.tasks.labels) == count:
        labels, problem = labels or model.tasks.labels, problem or model.tasks.problem
    labels = labels or tuple(f"LABEL_{i}" for i in range(count))  # as transformers calls them
    problem = problem or (Problem.REGRESSION if count == 1 else Problem.SINGLE_LABEL)
    return Pooled(values.cpu().numpy(), labels, problem, sequence.usage())
