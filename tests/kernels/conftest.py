"""Kernel tests run through each backend, and the C++ one through each ISA, of this machine.

With TRITON_INTERPRET=1 they run through the Triton kernels alone: test_triton.py starts that.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DTYPES, INTERPRETED

from manylora.kernels import Backend, cpu

if INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()

BACKENDS = ("reference", *(f"cpu-{isa}" for isa in (cpu.isas() if cpu.available() else ())))
if INTERPRETED:
    BACKENDS = ("triton",)
KERNELS = tuple(name for name in BACKENDS if name != "reference")


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """Whatever torch allocates and does not fill, results and scratch, holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn; "cpu-avx2" is the C++ one forced to that ISA."""
    yield from _using(request.param)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend but the reference, for what only they promise or refuse."""
    yield from _using(request.param)


def _using(name: str) -> Iterator[Backend]:
    name, _, isa = name.partition("-")
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
