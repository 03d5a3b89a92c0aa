"""Canaries of the interpreter's bfloat16 (tests/tools/triton_interpreter.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _probe(
    x: tl.tensor,
    y: tl.tensor,
    dots: tl.tensor,
    sums: tl.tensor,
    casts: tl.tensor,
    less: tl.tensor,
    N: tl.constexpr,
) -> None:
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(dots + at, tl.dot(a, b))
    tl.store(sums + at, a + b * a)
    tl.store(casts + at, (a.to(tl.float32) * 1.001).to(tl.bfloat16))
    tl.store(less + at, (a < b).to(tl.int32))


def test_bfloat16_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    dots, less = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.int32)
    sums, casts = torch.empty_like(x), torch.empty_like(x)
    _probe[(1,)](x, y, dots, sums, casts, less, N=16)
    torch.testing.assert_close(dots, x.float() @ y.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(sums, x + y * x)
    assert torch.equal(casts, (x.float() * 1.001).bfloat16())
    assert torch.equal(less.bool(), x < y)


@triton.jit
def _round(out: tl.tensor, whole: tl.tensor, N: tl.constexpr) -> None:
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(whole + at).to(tl.bfloat16))


def test_integers_are_rounded() -> None:
    out = torch.empty(4, dtype=torch.bfloat16)
    whole = torch.tensor([257, 258, 259, -1023], dtype=torch.int32)
    _round[(1,)](out, whole, N=4)
    assert torch.equal(out, whole.bfloat16())
