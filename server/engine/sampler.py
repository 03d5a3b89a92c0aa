"""Draws each row's next token.

A row's token depends on its own logits, parameters, history and generator alone, never on its
neighbours: every choice of path below is made row by row.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import Logprob, SamplingParams, TokenLogprobs

LEAST_TEMPERATURE = 1e-30  # below it, one over it is no float32
TOP_P_CANDIDATES = 1024  # sorted at first; all of the vocabulary only where they fall short


@dataclass(slots=True, frozen=True)
class Sample:
    token: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[Sample | None]:
    """A token for each row; None where the row's logits are not numbers.

    logits: float32 [len(sequences), vocab]; overwritten where penalties apply.
    """
    logprobs = _raw_logprobs(logits, sequences)
    for row, sequence in enumerate(sequences):
        _penalise(logits[row], sequence)
    largest, greedy = logits.max(dim=-1)  # a NaN counts as the largest
    finite, tokens = largest.isfinite().tolist(), greedy.tolist()
    samples: list[Sample | None] = []
    for row, sequence in enumerate(sequences):
        if not finite[row]:
            samples.append(None)
            continue
        token, raw = tokens[row], logprobs[row]
        if sequence.request.sampling.temperature > 0:
            token = _draw(logits[row], sequence.request.sampling, sequence.rng)
        samples.append(Sample(token, None if raw is None else _top(raw, token, sequence)))
    return samples


def _raw_logprobs(logits: Tensor, sequences: Seq[Sequence]) -> list[Tensor | None]:
    return [
        None if s.request.sampling.logprobs is None else torch.log_softmax(logits[row], dim=-1)
        for row, s in enumerate(sequences)
    ]


def _top(raw: Tensor, token: int, sequence: Sequence) -> TokenLogprobs:
    values, ids = raw.topk(min(sequence.request.sampling.logprobs or 0, len(raw)))
    top = tuple(
        Logprob(int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)
    )
    return TokenLogprobs(Logprob(token, float(raw[token])), top)


def _penalise(row: Tensor, sequence: Sequence) -> None:
    """Repetition penalty (Keskar et al. 2019, CTRL) over prompt and output; presence and
    frequency penalties (OpenAI's API) over output. In place; row float32 [vocab]."""
    params = sequence.request.sampling
    if params.repetition_penalty != 1.0:
        tokens = sequence.tokens[sequence.prefix_tokens :]
        seen = torch.tensor(sorted(set(tokens)), device=row.device)
        values = row[seen]
        factor = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / factor, values * factor)
    if sequence.output_counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(sequence.output_counts), device=row.device)
        counts = torch.tensor(
            list(sequence.output_counts.values()), dtype=row.dtype, device=row.device
        )
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(row: Tensor, params: SamplingParams, rng: np.random.Generator) -> int:
    """Inverse transform sampling over the kept tokens, in order of their ids."""
    # the largest becomes 0 first, so that a tiny temperature overflows to -inf only
    temperature = max(params.temperature, LEAST_TEMPERATURE)
    probabilities = torch.softmax((row - row.max()) / temperature, dim=-1)
    threshold = _threshold(probabilities, params)
    kept = (probabilities >= threshold).nonzero().squeeze(-1)
    cumulative = probabilities[kept].double().cumsum(dim=0)
    target = rng.random() * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(kept[min(index, len(kept) - 1)])


def _threshold(probabilities: Tensor, params: SamplingParams) -> float:
    """The least probability that top_k, then top_p (Holtzman et al. 2019) and min_p keep; ties
    with it are kept too. At least the smallest positive one: what is impossible is never drawn."""
    threshold = float(torch.finfo(probabilities.dtype).tiny)
    if params.min_p > 0:
        threshold = max(threshold, params.min_p * float(probabilities.max()))
    k = params.top_k if 0 < params.top_k < len(probabilities) else None
    if k is None and params.top_p >= 1:
        return threshold
    ordered = probabilities.topk(k or min(TOP_P_CANDIDATES, len(probabilities))).values
    if params.top_p < 1:
        mass = params.top_p * (float(ordered.double().sum()) if k else 1.0)
        if k is None and float(ordered.double().sum()) < mass:
            ordered = probabilities.sort(descending=True).values
        enough = int(torch.searchsorted(ordered.double().cumsum(dim=0), mass))
        ordered = ordered[: enough + 1]
    return max(threshold, float(ordered[-1]))
