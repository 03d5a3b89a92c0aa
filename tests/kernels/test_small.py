"""The small operations of every backend, and in every ISA that runs here, against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_steps import kept, make_step
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, drawn
from torch._subclasses.fake_tensor import FakeTensorMode

from manylora.kernels import Backend, cpu, reference

SIZES = (1, 31, 576) if INTERPRETED else (1, 3, 16, 31, 64, 100, 576, 1537)
# A unit in the last place of a result that is rounded once; float32: sums in another order.
TOLERANCE = {
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same rows in a wider matrix, between NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 13), torch.nan, dtype=x.dtype)
    wide[:, 5 : 5 + x.shape[1]] = x
    return wide[:, 5 : 5 + x.shape[1]]


def guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of x between canaries, and the canaries' memory."""
    memory = torch.full((x.numel() + 128,), 7.0, dtype=x.dtype)
    inside = memory[64:-64].view_as(x)
    inside.copy_(x)
    return inside, memory


def assert_untouched(*memories: torch.Tensor) -> None:
    for memory in memories:
        assert (memory[:64] == 7).all() and (memory[-64:] == 7).all(), "written beside a tensor"


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, **TOLERANCE[want.dtype])


def check_norm(
    backend: Backend, name: str, rows: int, size: int, dtype: torch.dtype, **options: Any
) -> None:
    x, weight = normal(0, rows, size, dtype=dtype) * 3, normal(1, size, dtype=dtype)
    arguments = (
        [weight, normal(2, size, dtype=dtype), 1e-5] if name == "layer_norm" else [weight, 1e-5]
    )
    ours, wanted = getattr(backend, name), getattr(reference, name)
    for x_given in (x, strided(x)):
        got, same = ours(x_given, *arguments, **options)
        assert same is x_given and got.is_contiguous()
        close(got, wanted(x, *arguments, **options)[0])
    residual = normal(3, rows, size, dtype=dtype)
    kept_residual, memory = guarded(residual)
    got, stream = ours(strided(x), *arguments, residual=kept_residual, **options)
    want, want_stream = wanted(x, *arguments, residual=residual, **options)
    assert stream is kept_residual and torch.equal(stream, want_stream)
    close(got, want)
    assert_untouched(memory)


@pytest.mark.parametrize("size", SIZES)
def test_norms(backend: Backend, size: int, dtype: torch.dtype) -> None:
    for rows in (3,) if INTERPRETED else (1, 7):
        check_norm(backend, "rms_norm", rows, size, dtype)
        check_norm(backend, "rms_norm", rows, size, dtype, offset=1.0)
        check_norm(backend, "layer_norm", rows, size, dtype)


@drawn(interpreted=8)
@given(
    name=st.sampled_from(["rms_norm", "layer_norm"]),
    rows=st.integers(1, 9 if INTERPRETED else 40),
    size=st.integers(2, 1300),
)
def test_norms_drawn(backend: Backend, dtype: torch.dtype, name: str, rows: int, size: int) -> None:
    check_norm(backend, name, rows, size, dtype)


def test_layer_norm_without_bias(backend: Backend, dtype: torch.dtype) -> None:
    x, weight = normal(0, 5, 40, dtype=dtype), normal(1, 40, dtype=dtype)
    wanted = F.layer_norm(x.double(), (40,), weight.double()).to(dtype)
    close(backend.layer_norm(x, weight, None, 1e-5)[0], wanted)


def gate(backend: Backend, x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return backend.silu_mul(x)
    return backend.gelu_mul(x, activation)


def exactly(x: torch.Tensor, activation: str) -> torch.Tensor:
    """In float64: torch's own float32 gelu loses the tail of negative numbers."""
    gates, up = x.double().chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gates) * up
    return F.gelu(gates, approximate=activation) * up


ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "tanh", "none"])
TAIL = 1e-6
"""What the reference's and Triton's gelu lose of the tail, beside values of the order of 1."""


def lost(backend: Backend) -> float:
    return 0.0 if backend.NAME == "cpu" else TAIL


@ACTIVATIONS
def test_activations(backend: Backend, activation: str, dtype: torch.dtype) -> None:
    for rows, size in ((1, 1), (3, 16), (2, 31), (5, 100), (1, 1536)):
        x = normal(0, rows, 2 * size, dtype=dtype) * 4
        want, unit = exactly(x, activation).to(dtype), TOLERANCE[dtype]
        for given_x in (x, strided(x)):
            got = gate(backend, given_x, activation)
            assert got.is_contiguous()
            atol = unit["atol"] + 4 * lost(backend)
            torch.testing.assert_close(got, want, rtol=unit["rtol"], atol=atol)


@drawn(interpreted=8)
@given(
    activation=st.sampled_from(["silu", "tanh", "none"]),
    rows=st.integers(1, 9),
    size=st.integers(1, 1300),
)
def test_activations_drawn(
    backend: Backend, dtype: torch.dtype, activation: str, rows: int, size: int
) -> None:
    x = normal(rows, rows, 2 * size, dtype=dtype)
    got, want = gate(backend, strided(x), activation), exactly(x, activation).to(dtype)
    unit = TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=unit["rtol"], atol=unit["atol"] + lost(backend))


@ACTIVATIONS
def test_activations_over_all_magnitudes(backend: Backend, activation: str) -> None:
    magnitudes = torch.logspace(-30, 37, 400)
    gates = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, -0.0, 90.0, -90.0, -104.0])])
    x = torch.cat([gates, torch.ones_like(gates)])[None]
    got, want = gate(backend, x, activation), exactly(x, activation)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-7 + lost(backend))


@ACTIVATIONS
def test_activations_of_what_is_not_finite(backend: Backend, activation: str) -> None:
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0]])
    [got] = gate(backend, x, activation)
    assert not got[:3].isfinite().any()  # of infinity, torch's own gelu is infinite or NaN
    close(got[3], exactly(x, activation)[0, 3].float())


def check_rotary(
    backend: Backend, heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype
) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    step = make_step([1, 9, 0, 3], [12, 9, 4, 30], dtype=dtype, **sizes)
    rows = step.batch.rows
    qkv = normal(0, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = normal(1, rows, half) * 10
    cos, sin = angles.cos(), angles.sin()
    caches, memories = zip(*map(guarded, kept(backend, step.k_cache, step.v_cache)), strict=True)
    wanted = step.k_cache.clone(), step.v_cache.clone()
    ours, theirs = strided(qkv), qkv.clone()
    around = ours.clone()
    got = backend.rotary_write_kv(ours, cos, sin, *caches, step.batch)
    want = reference.rotary_write_kv(theirs, cos, sin, *wanted, step.batch)
    assert got.data_ptr() == ours.data_ptr() and got.shape == (rows, heads, head_dim)
    close(got, want)
    assert torch.equal(ours[:, heads * head_dim :], around[:, heads * head_dim :])
    for cache, other in zip(caches, kept(backend, *wanted), strict=True):
        torch.testing.assert_close(cache, other, equal_nan=True, **TOLERANCE[dtype])
    assert_untouched(*memories)


@pytest.mark.parametrize("head_dim", [6, 80] if INTERPRETED else [2, 6, 12, 64, 80])
def test_rotary(backend: Backend, head_dim: int, dtype: torch.dtype) -> None:
    for half in {head_dim // 2, head_dim // 4, 0}:
        check_rotary(backend, 6, 2, head_dim, half, dtype)


@drawn(interpreted=6)
@given(data=st.data())
def test_rotary_drawn(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 35))
    heads, half = kv_heads * draw(st.integers(1, 4)), draw(st.integers(0, head_dim // 2))
    check_rotary(backend, heads, kv_heads, head_dim, half, dtype)


def test_a_broken_row_changes_no_other(backend: Backend, dtype: torch.dtype) -> None:
    x, weight = normal(0, 5, 90, dtype=dtype), normal(1, 90, dtype=dtype)
    functions = (
        lambda x: backend.rms_norm(x, weight, 1e-5)[0],
        lambda x: backend.layer_norm(x, weight, weight, 1e-5)[0],
        backend.silu_mul,
        backend.gelu_mul,
    )
    for function in functions:
        clean = function(x)
        for poison in (math.nan, math.inf):
            broken = x.clone()
            broken[2] = poison
            got = function(broken)
            assert got[2].isnan().any() or got[2].isinf().any()
            assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_the_other_rows(kernels: Backend, dtype: torch.dtype) -> None:
    rows = 20 if INTERPRETED else 300
    x, weight = normal(0, rows, 576, dtype=dtype), normal(1, 576, dtype=dtype)
    functions = (
        lambda x: kernels.rms_norm(x, weight, 1e-5)[0],
        lambda x: kernels.layer_norm(x, weight, None, 1e-5)[0],
        kernels.silu_mul,
    )
    for function in functions:
        together = function(x)
        for row in (0, rows // 2, rows - 1):
            assert torch.equal(function(x[row : row + 1])[0], together[row])


def test_no_rows(backend: Backend) -> None:
    assert backend.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5)[0].shape == (0, 8)
    assert backend.silu_mul(torch.empty(0, 8)).shape == (0, 4)


def test_misfits_are_refused(kernels: Backend) -> None:
    x, weight = normal(0, 4, 8), torch.ones(8)
    for wrong in (torch.ones(7), torch.ones(16)[::2]):
        with pytest.raises(ValueError, match="norm: wanted"):
            kernels.rms_norm(x, wrong, 1e-5)
        with pytest.raises(ValueError, match="norm: wanted"):
            kernels.layer_norm(x, weight, wrong, 1e-5)
    for residual in (normal(0, 8, 4).T, normal(0, 3, 8)):
        with pytest.raises(ValueError, match="wanted"):
            kernels.rms_norm(x, weight, 1e-5, residual=residual)
    for gate_up in (x.T, x[:, :7]):
        with pytest.raises(ValueError, match="gate_up: wanted"):
            kernels.silu_mul(gate_up)
    with pytest.raises(ValueError, match="approximate: found 'fast'"):
        kernels.gelu_mul(x, "fast")
    step = make_step([1], [4])
    caches, qkv = (step.k_cache, step.v_cache), normal(0, 1, 8 * 16)
    for angle in (torch.ones(1, 9), torch.ones(2, 8), torch.ones(1, 16)[:, ::2]):
        with pytest.raises(ValueError, match="wanted"):
            kernels.rotary_write_kv(qkv, angle, angle, *caches, step.batch)


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())
def test_other_dtypes_are_refused() -> None:
    x, step = normal(0, 4, 8), make_step([1], [4])
    with pytest.raises(ValueError, match="norm: wanted"):
        cpu.rms_norm(x, torch.ones(8).half(), 1e-5)
    with pytest.raises(ValueError, match="norm: wanted"):
        cpu.layer_norm(x, torch.ones(8), torch.ones(8).half(), 1e-5)
    for other in (x.double(), x.to("meta"), x[0]):
        with pytest.raises(ValueError, match="norm: wanted"):
            cpu.rms_norm(other, torch.ones(8), 1e-5)
    qkv, angle = normal(0, 1, 8 * 16), torch.ones(1, 8)
    for packed, angles in ((qkv[:, :-1], angle), (qkv, angle.half())):
        with pytest.raises(ValueError, match="rotary_write_kv: wanted"):
            cpu.rotary_write_kv(packed, angles, angles, step.k_cache, step.v_cache, step.batch)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """Its sizes, and no memory."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())
@pytest.mark.parametrize(
    "elsewhere",
    [
        lambda x: x.to("meta"),
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        lambda x: torch.nested.nested_tensor([x, x]),
        lambda x: FakeTensorMode().from_tensor(x),
        lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        freed,
        torch.Tensor.sum,
    ],
    ids=("meta", "sparse", "csr", "nested", "fake", "zero", "freed", "scalar"),
)
def test_what_lies_elsewhere_is_refused(elsewhere: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Or is no matrix: neither read, nor taken for nothing."""
    x, wide, step = normal(0, 4, 8), normal(0, 2, 64).bfloat16(), make_step([2], [9])
    caches, qkv, angle = (step.k_cache, step.v_cache), normal(0, 2, 8 * 16), torch.ones(2, 8)
    weight = cpu.PackedWeight(normal(0, 70, 64).bfloat16(), cpu.HugeArena())
    other, ones = elsewhere(x), torch.ones(8)
    for call in (
        lambda: cpu.rms_norm(x, ones, 1e-5, residual=other),
        lambda: cpu.rms_norm(x, other, 1e-5),
        lambda: cpu.linear(wide, weight, other),
        lambda: cpu.rotary_write_kv(qkv, elsewhere(angle), angle, *caches, step.batch),
        lambda: cpu.rotary_write_kv(qkv, angle, elsewhere(angle), *caches, step.batch),
        lambda: cpu.rotary_write_kv(elsewhere(qkv), angle, angle, *caches, step.batch),
        lambda: cpu.write_kv(other, other, *caches, step.batch),
        lambda: cpu.paged_attention(step.q, other, other, step.batch, scale=1.0),
        lambda: cpu.paged_attention(step.q, *caches, step.batch, scale=1.0, sinks=other),
    ):
        with pytest.raises(ValueError, match="wanted"):
            call()
    for call in (lambda: cpu.linear(elsewhere(wide), weight), lambda: cpu.silu_mul(other)):
        with pytest.raises((ValueError, RuntimeError)):
            call()
