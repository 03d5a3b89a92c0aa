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
    return EncoderInputs(
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        plan=make_plan(np.repeat(slots, counts), device),
        spans=list(itertools.pairwise(ends)),
        virtual=virtual_rows(prefixes, device),
    )
