"""Draws each row's next token, for all rows at once.

A row's token depends on its own logits, parameters, history and generator alone, never on its
neighbours: what is computed for many rows together has one row's bits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import Logprob, SamplingParams, TokenLogprobs

LEAST_TEMPERATURE = 1e-30  # below it, one over it is no float32
_BLOCK = 64  # tokens whose weights are summed before any is looked at
_LIKELY = 1e-3  # of the likeliest token's probability: what is looked at first


@dataclass(slots=True, frozen=True)
class Sample:
    token: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[Sample | None]:
    """A token for each row; None where the row's logits are not numbers.

    logits: float32 [len(sequences), vocab]; overwritten.
    """
    logprobs = _raw_logprobs(logits, sequences)
    for row, sequence in enumerate(sequences):
        if sequence.request.sampling.penalises:
            _penalise(logits[row], sequence)
    largest, greedy = logits.max(dim=-1)  # a NaN counts as the largest
    finite, tokens = largest.isfinite().tolist(), greedy.tolist()
    drawn = [
        row
        for row, sequence in enumerate(sequences)
        if finite[row] and sequence.request.sampling.temperature > 0
    ]
    if drawn:
        picked = logits if len(drawn) == len(logits) else logits[drawn]
        for row, token in zip(drawn, _draw(picked, [sequences[r] for r in drawn]), strict=True):
            tokens[row] = token
    samples: list[Sample | None] = []
    for row, sequence in enumerate(sequences):
        raw = logprobs.get(row)
        top = None if raw is None or not finite[row] else _top(raw, tokens[row], sequence)
        samples.append(Sample(tokens[row], top) if finite[row] else None)
    return samples


def _raw_logprobs(logits: Tensor, sequences: Seq[Sequence]) -> dict[int, Tensor]:
    """By row, where they are asked for: [vocab]."""
    rows = [i for i, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
    if not rows:
        return {}
    return dict(zip(rows, torch.log_softmax(logits[rows], dim=-1), strict=True))


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
    drawn = torch.tensor(list(sequence.output_counts), dtype=torch.int64, device=row.device)
    if params.repetition_penalty != 1.0:
        prompt = torch.from_numpy(sequence.prompt_ids).to(row.device)
        seen = torch.cat([prompt, drawn])  # one that is in both is written twice, the same
        values = row[seen]
        factor = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / factor, values * factor)
    if params.presence_penalty or params.frequency_penalty:
        times = list(sequence.output_counts.values())
        counts = torch.tensor(times, dtype=row.dtype, device=row.device)
        row[drawn] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Inverse transform sampling over each row's kept tokens, in order of their ids.

    logits: float32 [len(sequences), vocab], the largest of each row finite; overwritten.
    """
    params = [sequence.request.sampling for sequence in sequences]
    temperatures = torch.tensor(
        [[max(p.temperature, LEAST_TEMPERATURE)] for p in params], device=logits.device
    )
    # the largest becomes 0 first, so that a tiny temperature overflows to -inf only
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()
    if any(its.top_k or its.top_p < 1 or its.min_p for its in params):
        rows = weights.cpu().numpy()
        least = [_threshold(row, its) for row, its in zip(rows, params, strict=True)]
        thresholds = torch.tensor(least, dtype=torch.float32, device=logits.device)
        weights.masked_fill_(weights < thresholds[:, None], 0)
    numbers = np.array([sequence.rng.random() for sequence in sequences])
    return _pick(weights, numbers)


def _pick(weights: Tensor, numbers: npt.NDArray[np.float64]) -> list[int]:
    """For each row the token at which the running sum passes the row's number, a part of the sum.

    weights: float32 [n, vocab], of any sum above 0. numbers: [n], in [0, 1).
    """
    rows, vocab = weights.shape
    missing = -vocab % _BLOCK
    padded = F.pad(weights, (0, missing)) if missing else weights
    blocks = padded.view(rows, -1, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1).cpu().numpy()
    targets = numbers * sums[:, -1]
    chosen = _first_above(sums, targets)
    every = np.arange(rows)
    before = np.where(chosen > 0, sums[every, chosen - 1], 0.0)
    inside = blocks[torch.from_numpy(every), torch.from_numpy(chosen)]
    within = inside.double().cumsum(dim=-1).cpu().numpy()
    tokens: list[int] = (chosen * _BLOCK + _first_above(within, targets - before)).tolist()
    return tokens


def _first_above(
    sums: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Where each row's running sums first exceed its target; where they first reach their last,
    should rounding let none exceed it: never where nothing was added."""
    above = np.count_nonzero(sums <= targets[:, None], axis=1)
    found: npt.NDArray[np.int64] = np.minimum(above, np.count_nonzero(sums < sums[:, -1:], axis=1))
    return found


def _threshold(weights: npt.NDArray[np.float32], params: SamplingParams) -> float:
    """The least weight that top_k, then top_p (Holtzman et al. 2019) and min_p keep; ties with it
    are kept too; 0 where all are. weights: [vocab], the largest 1."""
    vocab, by_rank = len(weights), 0 < params.top_k < len(weights)
    if not by_rank and params.top_p == 1:
        return params.min_p
    likely = weights[weights >= _LIKELY]
    if by_rank:
        some = likely if len(likely) >= params.top_k else weights
        ordered = _descending(np.partition(some, -params.top_k)[-params.top_k :])
        mass = params.top_p * ordered.sum()
    else:
        total = weights.sum(dtype=np.float64)
        mass, ordered = params.top_p * total, _descending(likely)
        if ordered.sum() < mass:
            # those below are all beside the nucleus: together they are less than 1 - top_p of it
            ordered = _descending(weights[weights >= (1 - params.top_p) * total / vocab])
    if params.top_p < 1:
        ordered = ordered[: int(np.searchsorted(ordered.cumsum(), mass)) + 1]
    return max(params.min_p, float(ordered[-1]))


def _descending(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.sort(weights)[::-1].astype(np.float64)
