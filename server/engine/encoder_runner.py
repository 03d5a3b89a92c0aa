"""One step of an encoder: whole sequences in, hidden rows kept in the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq

import numpy as np
import torch

from manylora.kernels import make_plan
from manylora.server.engine.model import EncoderInputs, EncoderModel
from manylora.server.engine.prefix import Prefix, virtual_rows
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
    positions = [p for s in sequences for p in model.positions(s.tokens, s.prefix_tokens)]
    prefixes: list[tuple[int, range, Prefix]] = [
        (first, range(s.prefix_tokens), s.prefix)
        for first, s in zip(ends, sequences, strict=False)
        if s.prefix is not None
    ]
    slots = np.array([s.slot for s in sequences], np.int32)
    types = [t for s in sequences for t in _token_types(s)] if _any_types(sequences) else None
    return EncoderInputs(
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        plan=make_plan(np.repeat(slots, counts), device),
        spans=list(itertools.pairwise(ends)),
        token_types=None if types is None else torch.tensor(types, device=device),
        virtual=virtual_rows(prefixes, device),
    )


def _any_types(sequences: Seq[Sequence]) -> bool:
    return any(s.request.token_types for s in sequences)


def _token_types(sequence: Sequence) -> list[int]:
    """Virtual tokens have type 0; where an embedding is wanted, peft leaves out all types behind
    them."""
    request = sequence.request
    embeds = request.pooling is not None and request.pooling.task is PooledTask.EMBED
    if not request.token_types or (embeds and sequence.prefix_tokens):
        return [0] * len(sequence.tokens)
    return [0] * sequence.prefix_tokens + list(request.token_types)
