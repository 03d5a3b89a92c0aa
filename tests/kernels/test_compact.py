"""Weights in 12 bits: what AMX's kernel reads is what was packed, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.kernels import EditTable, SliceGroup, cpu, make_plan

pytestmark = pytest.mark.skipif(
    not cpu.available() or cpu.current_isa() != "amx", reason="only AMX's kernel has them"
)
BFLOAT16 = torch.bfloat16


def weights(shape: tuple[int, int], exponent: int, rare: float, seed: int) -> torch.Tensor:
    """Finite, none below 2^-126: most in 12 exponents from `exponent` on, a tenth zero, of the rest
    so many anywhere."""
    random = np.random.default_rng(seed)
    exponents = exponent + random.integers(0, 12, shape)
    anywhere = random.random(shape) < rare
    exponents[anywhere] = random.integers(1, 255, shape)[anywhere]
    bits = random.integers(0, 2, shape) << 15 | exponents << 7 | random.integers(0, 128, shape)
    bits[random.random(shape) < 0.1] = 0
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(BFLOAT16)


def products(a: torch.Tensor, b: torch.Tensor, alone: bool) -> torch.Tensor:
    """B A e for each unit vector e: all of one adapter, or each of its own."""
    rank, in_size = a.shape
    rows, out = in_size, len(b)
    packed = [cpu.pack_a(a, BFLOAT16), cpu.pack_b(b, BFLOAT16)]
    room = torch.full((64,), torch.nan, dtype=BFLOAT16)
    parts = [room, *(part for p in packed for part in (p, room[: 32 + -len(p) % 32]))]
    starts = np.cumsum([0, *map(len, parts)])
    table = EditTable(rows, 1)
    offsets = np.array([[starts[1], starts[3], -1, -1, -1]])
    for slot in range(rows):
        table.write(slot, np.array([rank], np.int32), np.ones(1, np.float32), offsets)
    slots = np.arange(rows) if alone else np.zeros(rows)
    y = torch.zeros(rows, out, dtype=BFLOAT16)
    x = torch.eye(in_size, dtype=BFLOAT16)
    plan = make_plan(slots.astype(np.int32))
    cpu.apply_edits_(y, x, SliceGroup.single(0, out), torch.cat(parts), table, plan)
    return y


EXPONENTS = st.integers(1, 243)
RARE = st.sampled_from((0.0, 0.004, 0.01, 1.0))
SEEDS = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 200), EXPONENTS, RARE, SEEDS, st.booleans())
def test_every_weight_of_a_comes_back(
    rank: int, in_size: int, exponent: int, rare: float, seed: int, alone: bool
) -> None:
    a = weights((rank, in_size), exponent, rare, seed)
    assert torch.equal(products(a, torch.eye(rank, dtype=BFLOAT16), alone), a.T)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 1500), EXPONENTS, RARE, SEEDS, st.booleans())
def test_every_weight_of_b_comes_back(
    rank: int, out: int, exponent: int, rare: float, seed: int, alone: bool
) -> None:
    b = weights((out, rank), exponent, rare, seed)
    assert torch.equal(products(torch.eye(rank, dtype=BFLOAT16), b, alone), b.T)


def test_usual_weights_take_a_quarter_less() -> None:
    a = torch.randn(16, 576, generator=torch.Generator().manual_seed(0))
    for scale in (1e-6, 0.02, 1.0):
        assert len(cpu.pack_a(a * scale, BFLOAT16)) < 0.77 * a.numel()
    assert len(cpu.pack_a(torch.zeros(16, 576), BFLOAT16)) < 0.77 * a.numel()
