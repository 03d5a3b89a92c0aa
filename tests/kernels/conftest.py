"""Kernel tests run through each backend, and the C++ one through each ISA, of this machine.

With TRITON_INTERPRET=1 they run through the Triton kernels alone: test_triton.py starts that.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

from manylora.kernels import Backend, cpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", *(f"cpu-{isa}" for isa in (cpu.isas() if cpu.available() else ())))
if INTERPRETED:
    BACKENDS = ("triton",)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn; "cpu-avx2" is the C++ one forced to that ISA."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield importlib.import_module(f"manylora.kernels.{name}")
        return
    before = cpu.current_isa()
    cpu.set_isa(isa)
    yield cpu
    cpu.set_isa(before)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch's pool with two threads, whatever the machine was told."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
