"""The small operations in C++, in every ISA that runs here, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_steps import make_step, packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora.kernels import cpu, reference_small
from manylora.kernels.cpu import small

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 3, 16, 31, 64, 100, 576, 1537)
DRAWN = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one ISA for all examples
)
# A unit in the last place of a result that is rounded once; float32: sums in another order.
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
}


@pytest.fixture(params=cpu.isas() if cpu.available() else (), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = cpu.current_isa()
    cpu.set_isa(request.param)
    yield
    cpu.set_isa(before)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same rows in a wider matrix, between NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 13), torch.nan, dtype=x.dtype)
    wide[:, 5 : 5 + x.shape[1]] = x
    return wide[:, 5 : 5 + x.shape[1]]


def guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of x between canaries, and the canaries."""
    memory = torch.full((x.numel() + 128,), 7.0, dtype=x.dtype)
    inside = memory[64:-64].view_as(x)
    inside.copy_(x)
    return inside, torch.cat([memory[:64], memory[-64:]])


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, **TOLERANCE[want.dtype])


def check_norm(name: str, rows: int, size: int, dtype: torch.dtype, **options: Any) -> None:
    x, weight = normal(0, rows, size, dtype=dtype) * 3, normal(1, size, dtype=dtype)
    arguments = (
        [weight, normal(2, size, dtype=dtype), 1e-5] if name == "layer_norm" else [weight, 1e-5]
    )
    ours, wanted = getattr(small, name), getattr(reference_small, name)
    for x_given in (x, strided(x)):
        got, same = ours(x_given, *arguments, **options)
        assert same is x_given and got.is_contiguous()
        close(got, wanted(x, *arguments, **options)[0])
    residual = normal(3, rows, size, dtype=dtype)
    kept, canaries = guarded(residual)
    got, stream = ours(strided(x), *arguments, residual=kept, **options)
    want, want_stream = wanted(x, *arguments, residual=residual, **options)
    assert stream is kept and torch.equal(stream, want_stream)
    close(got, want)
    assert (canaries == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_norms(size: int, dtype: torch.dtype) -> None:
    for rows in (1, 7):
        check_norm("rms_norm", rows, size, dtype)
        check_norm("rms_norm", rows, size, dtype, offset=1.0)
        check_norm("layer_norm", rows, size, dtype)


@DRAWN
@given(
    st.sampled_from(["rms_norm", "layer_norm"]),
    st.integers(1, 40),
    st.integers(2, 700),
    st.sampled_from(DTYPES),
)
def test_norms_drawn(name: str, rows: int, size: int, dtype: torch.dtype) -> None:
    check_norm(name, rows, size, dtype)


def test_layer_norm_without_bias() -> None:
    x, weight = normal(0, 5, 40), normal(1, 40)
    close(small.layer_norm(x, weight, None, 1e-5)[0], F.layer_norm(x, (40,), weight))


def gate(module: Any, x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return module.silu_mul(x)
    return module.gelu_mul(x, activation)


def exactly(x: torch.Tensor, activation: str) -> torch.Tensor:
    """In float64: torch's own float32 gelu loses the tail of negative numbers."""
    gates, up = x.double().chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gates) * up
    return F.gelu(gates, approximate=activation) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "tanh", "none"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    for rows, size in ((1, 1), (3, 16), (2, 31), (5, 100), (1, 1536)):
        x = normal(0, rows, 2 * size, dtype=dtype) * 4
        want = exactly(x, activation).to(dtype)
        close(gate(small, x, activation), want)
        close(gate(small, strided(x), activation), want)
        torch.testing.assert_close(gate(reference_small, x, activation), want, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "tanh", "none"])
def test_activations_over_all_magnitudes(activation: str) -> None:
    magnitudes = torch.logspace(-30, 37, 400)
    gates = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, -0.0, 90.0, -90.0, -104.0])])
    x = torch.cat([gates, torch.ones_like(gates)])[None]
    got, want = gate(small, x, activation), exactly(x, activation)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("activation", ["silu", "tanh", "none"])
def test_activations_of_what_is_not_finite(activation: str) -> None:
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0]])
    got, want = gate(small, x, activation), gate(reference_small, x, activation)
    torch.testing.assert_close(got, want, equal_nan=True)


def check_rotary(heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    step = make_step([1, 9, 0, 3], [12, 9, 4, 30], dtype=dtype, **sizes)
    rows = step.batch.rows
    qkv = normal(0, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = normal(1, rows, half) * 10
    cos, sin = angles.cos(), angles.sin()
    caches, canaries = zip(*map(guarded, packed(step.k_cache, step.v_cache)), strict=True)
    wanted = step.k_cache.clone(), step.v_cache.clone()
    ours, theirs = strided(qkv), qkv.clone()
    around = ours.clone()
    got = small.rotary_write_kv(ours, cos, sin, *caches, step.batch)
    want = reference_small.rotary_write_kv(theirs, cos, sin, *wanted, step.batch)
    assert got.data_ptr() == ours.data_ptr() and got.shape == (rows, heads, head_dim)
    close(got, want)
    assert torch.equal(ours[:, heads * head_dim :], around[:, heads * head_dim :])
    for cache, other in zip(caches, packed(*wanted), strict=True):
        torch.testing.assert_close(cache, other, equal_nan=True, **TOLERANCE[dtype])
    assert all((canary == 7).all() for canary in canaries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 12, 64, 80])
def test_rotary(head_dim: int, dtype: torch.dtype) -> None:
    for half in {head_dim // 2, head_dim // 4, 0}:
        check_rotary(6, 2, head_dim, half, dtype)


@DRAWN
@given(st.data())
def test_rotary_drawn(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 35))
    heads, half = kv_heads * draw(st.integers(1, 4)), draw(st.integers(0, head_dim // 2))
    check_rotary(heads, kv_heads, head_dim, half, draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_row_changes_no_other(dtype: torch.dtype) -> None:
    x, weight = normal(0, 5, 90, dtype=dtype), normal(1, 90, dtype=dtype)
    functions = (
        lambda x: small.rms_norm(x, weight, 1e-5)[0],
        lambda x: small.layer_norm(x, weight, weight, 1e-5)[0],
        small.silu_mul,
        small.gelu_mul,
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
def test_bits_do_not_depend_on_the_other_rows() -> None:
    x, weight = normal(0, 300, 576), normal(1, 576)
    norm, layer = small.rms_norm(x, weight, 1e-5)[0], small.layer_norm(x, weight, None, 1e-5)[0]
    gated = small.silu_mul(x)
    for row in (0, 150, 299):
        alone = x[row : row + 1]
        assert torch.equal(small.rms_norm(alone, weight, 1e-5)[0][0], norm[row])
        assert torch.equal(small.layer_norm(alone, weight, None, 1e-5)[0][0], layer[row])
        assert torch.equal(small.silu_mul(alone)[0], gated[row])


def test_no_rows() -> None:
    assert small.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5)[0].shape == (0, 8)
    assert small.silu_mul(torch.empty(0, 8)).shape == (0, 4)


def test_misfits_are_refused() -> None:
    x, weight = normal(0, 4, 8), torch.ones(8)
    for wrong in (torch.ones(7), torch.ones(8).half(), torch.ones(16)[::2]):
        with pytest.raises(ValueError, match="rms_norm: wanted"):
            small.rms_norm(x, wrong, 1e-5)
        with pytest.raises(ValueError, match="layer_norm: wanted"):
            small.layer_norm(x, weight, wrong, 1e-5)
    with pytest.raises(ValueError, match="residual: wanted"):
        small.rms_norm(x, weight, 1e-5, residual=normal(0, 8, 4).T)
    with pytest.raises(ValueError, match="gate_up: wanted"):
        small.silu_mul(x.T)
    with pytest.raises(ValueError, match="approximate: found 'fast'"):
        small.gelu_mul(x, "fast")
    step = make_step([1], [4])
    qkv, angle = normal(0, 1, 8 * 16), torch.ones(1, 8)
    for given_qkv, given_angle in (
        (qkv[:, :-1], angle),
        (qkv, torch.ones(1, 9)),
        (qkv, angle.half()),
    ):
        with pytest.raises(ValueError, match="rotary_write_kv: wanted"):
            small.rotary_write_kv(
                given_qkv, given_angle, given_angle, step.k_cache, step.v_cache, step.batch
            )
