"""The check ahead of time sees what it looks for: kernels made to spill, to want too much shared
memory, to add atomically.

Not collected by itself: test_triton.py runs it in a process of its own, not in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from manylora.kernels.triton import compile_check
from manylora.kernels.triton.compile_check import Model


@triton.jit
def _square(x: tl.tensor, N: tl.constexpr, ATOMIC: tl.constexpr) -> None:
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x + at)
    result = tl.dot(tile, tile)
    if ATOMIC:
        tl.atomic_add(x + at, result.to(tile.dtype))
    else:
        tl.store(x + at, result.to(tile.dtype))


def launch(size: int, atomic: bool, warps: int) -> Callable[[Model, torch.dtype], None]:
    def operation(model: Model, dtype: torch.dtype) -> None:  # noqa: ARG001
        x = torch.empty(size, size, dtype=torch.float16, device="meta")
        _square[(1,)](x, N=size, ATOMIC=atomic, num_warps=warps)

    return operation


@pytest.mark.parametrize(
    ("target", "size", "atomic", "warps", "wrong"),
    [
        ("cuda:80", 32, False, 4, set()),
        ("cuda:80", 32, True, 4, {"atomics"}),
        ("cuda:80", 128, False, 1, {"spills"}),
        ("hip:gfx942", 32, False, 4, set()),
        ("hip:gfx942", 32, True, 4, {"atomics"}),
        ("hip:gfx942", 256, False, 2, {"spills"}),
    ],
)
def test_what_does_not_fit_is_found(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    size: int,
    atomic: bool,
    warps: int,
    wrong: set[str],
) -> None:
    monkeypatch.setattr(compile_check, "OPERATIONS", (launch(size, atomic, warps),))
    [found] = compile_check.check(["qwen-2.5-0.5b"], ["fp16"], [target])
    assert found.kernel == "square"
    assert {name for name in ("spills", "atomics") if getattr(found, name)} == wrong
    assert found.fits == (not wrong)
    arguments = ["--models", "qwen-2.5-0.5b", "--dtypes", "fp16", "--targets", target]
    assert compile_check.main(arguments) == bool(wrong)


def test_too_much_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "OPERATIONS", (launch(256, False, 8),))
    [found] = compile_check.check(["qwen-2.5-0.5b"], ["fp16"], ["cuda:120"])
    assert found.shared > found.limit
    assert not found.fits
