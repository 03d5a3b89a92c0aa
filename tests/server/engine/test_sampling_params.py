"""Each value that makes no sense is refused by its own name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from manylora.errors import InvalidArgument
from manylora.server.engine.sampling_params import MAX_SEED, validate
from manylora.server.engine.types import SamplingParams

VOCAB = 100
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", v) for v in (0, -1)),
        *(("temperature", v) for v in (-0.1, -1e-300, 100.5, NAN, INF, -INF)),
        *(("top_p", v) for v in (0.0, -0.5, 1.0000001, NAN, INF)),
        *(("top_k", v) for v in (-1, 2**31)),
        *(("min_p", v) for v in (-0.1, 1.1, NAN)),
        *(("repetition_penalty", v) for v in (0.0, -1.0, 1e-30, 1e9, NAN, INF)),
        *(("presence_penalty", v) for v in (-2.1, 2.1, NAN, INF)),
        *(("frequency_penalty", v) for v in (-2.1, 2.1, NAN, -INF)),
        *(("seed", v) for v in (-1, MAX_SEED + 1)),
        *(("logprobs", v) for v in (-1, 21)),
    ],
)
def test_out_of_range(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate(replace(SamplingParams(), **{field: value}), VOCAB)
    assert caught.value.field == f"sampling.{field}"
    assert caught.value.found == str(value)
    assert caught.value.wanted


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("stop", ("a",) * 17, "stop"),
        ("stop", ("a", ""), "stop[1]"),
        ("stop", ("a" * 1001,), "stop[0]"),
        ("stop_token_ids", (0,) * 1025, "stop_token_ids"),
        ("stop_token_ids", (VOCAB,), "stop_token_ids[0]"),
        ("stop_token_ids", (0, 1, -1), "stop_token_ids[2]"),
    ],
)
def test_lists_name_the_element(field: str, value: tuple[object, ...], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate(replace(SamplingParams(), **{field: value}), VOCAB)
    assert caught.value.field == f"sampling.{named}"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(max_tokens=1, temperature=100.0, top_p=1.0, top_k=2**31 - 1, min_p=1.0),
        SamplingParams(temperature=1e-300, top_p=1e-300, min_p=1e-300, repetition_penalty=100.0),
        SamplingParams(seed=MAX_SEED, presence_penalty=-2.0, frequency_penalty=2.0, logprobs=20),
        SamplingParams(seed=0, logprobs=0, stop=("a",) * 16, stop_token_ids=(0, VOCAB - 1)),
    ],
)
def test_the_edges_are_allowed(params: SamplingParams) -> None:
    validate(params, VOCAB)
