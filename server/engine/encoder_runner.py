"""One step of an encoder: whole sequences in, hidden rows kept in the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq

import numpy as np
import torch

from manylora.kernels import make_plan
from manylora.server.engine.model import EncoderInputs, EncoderModel
from manylora.server.engine.prefix import Prefix, keys_values, virtual_rows
from manylora.server.engine.scheduler import Chunk
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import PooledTask


def run_encoder_step(model: EncoderModel, chunks: Seq[Chunk], device: torch.device) -> None:
    """chunks: each a whole sequence."""
    model.forward(encoder_inputs(model, chunks, device))


def encoder_inputs(model: EncoderModel, chunks: Seq[Chunk], device: torch.device) -> EncoderInputs:
    sequences = [chunk.sequence for chunk in chunks]
    counts = [chunk.count for chunk in chunks]
    ends = np.cumsum([0, *counts]).tolist()
    tokens = [max(token, 0) for s in sequences for token in s.tokens]
    virtual: list[tuple[int, range, Prefix]] = [
        (first, range(s.prefix_tokens), s.prefix)
        for first, s in zip(ends, sequences, strict=False)
        if s.prefix is not None and s.prefix_tokens
    ]
    slots = np.array([s.slot for s in sequences], np.int32)
    types = [t for s in sequences for t in _token_types(s)] if _any_types(sequences) else None
    return EncoderInputs(
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor([p for s in sequences for p in _positions(model, s)], device=device),
        plan=make_plan(np.repeat(slots, counts), device),
        spans=list(itertools.pairwise(ends)),
        prefixes=[_keys_values(model, s) for s in sequences],
        token_types=None if types is None else torch.tensor(types, device=device),
        virtual=virtual_rows(virtual, device),
    )


def _positions(model: EncoderModel, sequence: Sequence) -> list[int]:
    own = sequence.prefix_tokens
    before = 0 if own or sequence.prefix is None else sequence.prefix.tokens
    return model.positions(sequence.tokens, own, before)


def _keys_values(model: EncoderModel, sequence: Sequence) -> torch.Tensor | None:
    if sequence.prefix is None or sequence.prefix_tokens:
        return None
    return keys_values(model.step.pool, sequence.prefix, 0, len(model.kv_layout))


def _any_types(sequences: Seq[Sequence]) -> bool:
    return any(s.request.token_types for s in sequences)


def _token_types(sequence: Sequence) -> list[int]:
    """Virtual tokens have type 0; where an embedding is wanted, peft leaves out all types behind
    them and behind a prefix."""
    request = sequence.request
    embeds = request.pooling is not None and request.pooling.task is PooledTask.EMBED
    if not request.token_types or (embeds and sequence.prefix is not None):
        return [0] * len(sequence.tokens)
    return [0] * sequence.prefix_tokens + list(request.token_types)
