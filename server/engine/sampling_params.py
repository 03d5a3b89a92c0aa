"""Checks of sampling parameters."""

from __future__ import annotations

import math

from manylora.errors import InvalidArgument
from manylora.server.engine.types import SamplingParams

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_STOP_TOKENS = 1024
MAX_SEED = 2**64 - 1


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidArgument with the field's name if a value makes no sense."""
    _check("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1")
    _range("temperature", params.temperature, 0.0, 100.0)
    _range("top_p", params.top_p, 0.0, 1.0, open_low=True)
    _check("top_k", params.top_k, 0 <= params.top_k < 2**31, "0 (off) or more")
    _range("min_p", params.min_p, 0.0, 1.0)
    _range("repetition_penalty", params.repetition_penalty, 0.01, 100.0)
    _range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if params.seed is not None:
        _check("seed", params.seed, 0 <= params.seed <= MAX_SEED, "an unsigned 64-bit integer")
    if params.logprobs is not None:
        ok = 0 <= params.logprobs <= MAX_LOGPROBS
        _check("logprobs", params.logprobs, ok, f"0 to {MAX_LOGPROBS}")
    _check("stop", len(params.stop), len(params.stop) <= MAX_STOPS, f"at most {MAX_STOPS} strings")
    for i, stop in enumerate(params.stop):
        ok = 1 <= len(stop) <= MAX_STOP_CHARACTERS
        _check(f"stop[{i}]", stop, ok, f"1 to {MAX_STOP_CHARACTERS} characters")
    ok = len(params.stop_token_ids) <= MAX_STOP_TOKENS
    _check("stop_token_ids", len(params.stop_token_ids), ok, f"at most {MAX_STOP_TOKENS}")
    for i, token in enumerate(params.stop_token_ids):
        ok = 0 <= token < vocab_size
        _check(f"stop_token_ids[{i}]", token, ok, f"a token id below {vocab_size}")


def _range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    ok = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    _check(name, value, ok, f"{'above' if open_low else 'from'} {low:g}, at most {high:g}")


def _check(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise InvalidArgument("out of range", field=f"sampling.{name}", found=value, wanted=wanted)
