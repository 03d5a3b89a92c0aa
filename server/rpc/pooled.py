"""What requests that want no text have as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from manylora.adapters_store.head import Problem
from manylora.errors import InvalidArgument
from manylora.server.engine.tokenizer import Span
from manylora.server.engine.types import Rows
from manylora.v1 import inference_pb2 as pb

Floats: TypeAlias = npt.NDArray[np.float32]

PROBLEMS: Mapping[Problem | None, pb.Problem] = {
    Problem.REGRESSION: pb.PROBLEM_REGRESSION,
    Problem.SINGLE_LABEL: pb.PROBLEM_SINGLE_LABEL,
    Problem.MULTI_LABEL: pb.PROBLEM_MULTI_LABEL,
}
_ROWS: Mapping[int, Rows | None] = {
    pb.POOLING_UNSPECIFIED: None,
    pb.POOLING_FIRST: Rows.FIRST,
    pb.POOLING_LAST: Rows.LAST,
    pb.POOLING_MEAN: Rows.MEAN,
}


def read_pooling(value: int) -> Rows | None:
    """Which rows; None: as is usual for the base. Raises InvalidArgument for an unknown value."""
    if value not in _ROWS:
        raise InvalidArgument(
            "no such pooling",
            field="pooling",
            found=value,
            wanted=", ".join(pb.Pooling.keys()),
        )
    return _ROWS[value]


def scores(logits: Floats, problem: Problem | None) -> pb.Scores:
    """logits: [labels]."""
    return pb.Scores(logits=logits.tolist(), scores=_probabilities(logits, problem).tolist())


def token_scores(
    token: int, logits: Floats, problem: Problem | None, span: Span | None
) -> pb.TokenScores:
    """logits: [labels]."""
    answer = pb.TokenScores(token_id=token, scores=scores(logits, problem))
    if span is not None:
        answer.span.CopyFrom(pb.Span(start=span.start, end=span.end, text=span.text))
    return answer


def _probabilities(logits: Floats, problem: Problem | None) -> Floats:
    match problem:
        case Problem.SINGLE_LABEL:
            powers = np.exp(logits - logits.max())
            return np.asarray(powers / powers.sum(), np.float32)
        case Problem.MULTI_LABEL:
            powers = np.exp(-np.abs(logits))  # of negative numbers: none overflows
            return np.asarray(np.where(logits < 0, powers, 1) / (1 + powers), np.float32)
        case _:
            return logits
