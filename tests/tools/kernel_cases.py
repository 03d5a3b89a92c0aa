"""What the tests of kernels share: dtypes, how many cases are drawn, whether Triton interprets."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The tests run through the Triton kernels alone, milliseconds a program."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def drawn(interpreted: int) -> settings:
    """Settings of a test of drawn cases; interpreted: how many are drawn in the interpreter."""
    return settings(
        max_examples=interpreted if INTERPRETED else 25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # one backend for all cases
    )
