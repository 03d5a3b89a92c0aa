"""The base's products with packed weights, on every ISA that the machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.kernels import cpu

ISAS = cpu.isas() if cpu.available() else ()


@pytest.fixture(params=ISAS, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = cpu.current_isa()
    cpu.set_isa(request.param)
    yield
    cpu.set_isa(before)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.usefixtures("isa")
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    out=st.integers(1, 100),
    depth=st.integers(1, 5),
    bias=st.booleans(),
    spare=st.sampled_from([0, 8]),
)
def test_product(rows: int, out: int, depth: int, bias: bool, spare: int) -> None:
    x = matrix(rows, 32 * depth + spare, 1)[:, : 32 * depth]
    w, b = matrix(out, 32 * depth, 2), matrix(1, out, 3)[0] if bias else None
    packed = cpu.PackedWeight(w, cpu.HugeArena())
    y = cpu.linear(x, packed, b)
    wanted = x.double() @ w.double().T + (0 if b is None else b.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-4)
    for row in range(0, rows, 13):
        assert torch.equal(cpu.linear(x[row : row + 1], packed, b)[0], y[row])


@pytest.mark.usefixtures("isa")
def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    x = matrix(65, 576, 1)
    packed = cpu.PackedWeight(matrix(48, 576, 2), cpu.HugeArena())
    y = cpu.linear(x, packed)
    x[1::2] = float("nan")
    assert torch.equal(cpu.linear(x, packed)[::2], y[::2])


@pytest.mark.usefixtures("isa", "two_threads")
@pytest.mark.parametrize(
    ("rows", "depth", "out"), [(521, 4096, 40), (40, 5120, 700), (3, 4128, 400)]
)
def test_more_than_caches_hold_at_once(rows: int, depth: int, out: int) -> None:
    x, w, b = matrix(rows, depth + 8, 1)[:, :depth], matrix(out, depth, 2), matrix(1, out, 3)[0]
    packed = cpu.PackedWeight(w, cpu.HugeArena())
    y = cpu.linear(x, packed, b)
    wanted = x.double() @ w.double().T + b.double()
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=3e-4)
    torch.set_num_threads(1)
    assert torch.equal(cpu.linear(x, packed, b), y)
    for row in (*range(0, rows, 17), rows - 1):
        assert torch.equal(cpu.linear(x[row : row + 1], packed, b)[0], y[row])


@pytest.mark.parametrize("out", [16, 17, 100])
def test_unpack(out: int) -> None:
    w = matrix(out, 64, 1)
    packed = cpu.PackedWeight(w, cpu.HugeArena())
    assert torch.equal(packed.unpack(0, out), w)
    assert torch.equal(packed.unpack(3, 9), w[3:12])


def test_weights_that_lie_anyhow() -> None:
    """A head is packed as its file has it."""
    w = matrix(35, 64, 1)
    wide, odd = matrix(35, 65, 2), torch.zeros(w.numel() + 1, dtype=torch.bfloat16)
    wide[:, 1:], odd[1:] = w, w.flatten()
    for same in (wide[:, 1:], odd[1:].view(35, 64)):
        assert torch.equal(cpu.PackedWeight(same, cpu.HugeArena()).unpack(), w)


def test_misfit() -> None:
    packed = cpu.PackedWeight(matrix(16, 64, 1), cpu.HugeArena())
    with pytest.raises(ValueError, match="found x"):
        cpu.linear(matrix(2, 32, 1), packed)
    with pytest.raises(ValueError, match="found x"):
        cpu.linear(matrix(2, 64, 1).float(), packed)
    assert not cpu.packs(matrix(16, 40, 1))
    assert not cpu.packs(matrix(16, 0, 1))


def test_arena_hands_out_disjoint_memory() -> None:
    arena = cpu.HugeArena()
    tensors = [arena.empty((n,), torch.float32) for n in (3, 1000, 16 << 20, 5)]
    for i, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(i)
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))
