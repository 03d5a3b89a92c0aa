"""Products of 8 bits by definition, and a base quantised at load with adapters on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from manylora_testing import FlatRunner, Oracle, Stream, tiny_lora, tiny_model

from manylora import kernels
from manylora.errors import FailedPrecondition
from manylora.server.engine.model import AdaptedModel, load_base
from manylora.server.engine.model.product import Int8Product, int8_is_exact, quantise

CPU = torch.device("cpu")
exact = pytest.mark.skipif(not int8_is_exact(), reason="this CPU has no VNNI")


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exact
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
)
def test_int8_by_definition(
    seed: int, rows: int, sizes: tuple[int, int], dtype: torch.dtype, biased: bool
) -> None:
    x, weight = drawn(seed, rows, sizes[0]).to(dtype), drawn(seed + 1, *sizes[::-1]).to(dtype)
    bias = drawn(seed + 2, sizes[1]).to(dtype) if biased else None
    product = Int8Product(weight, bias)
    (a, a_scales), (b, b_scales) = quantise(x), quantise(weight)
    assert a.abs().amax(dim=1).eq(127).all()
    wanted = (a.double() @ b.double().T) * a_scales * b_scales.T
    wanted = wanted if bias is None else wanted + bias
    found = product(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype))
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    off = (product.weight(0, sizes[1]).float() - weight.float()).abs()
    assert (off <= step * (0.51 if dtype == torch.float32 else 1.2)).all()
    half = sizes[1] // 2
    assert torch.equal(product.weight(half, 1), product.weight(0, sizes[1])[half : half + 1])


@exact
def test_int8_rows_stand_by_themselves() -> None:
    x, product = drawn(0, 37, 64), Int8Product(drawn(1, 48, 64), None)
    x[5], x[6], x[7] = torch.nan, 0.0, 1e30
    together = product(x)
    assert together[5].isnan().all()
    assert together[6].eq(0).all()
    for row in (0, 6, 7, 36):
        assert torch.equal(product(x[row : row + 1])[0], together[row])


def test_int8_of_no_rows() -> None:
    """The head has none in a step that samples nothing."""
    assert Int8Product(drawn(1, 48, 64), None)(torch.empty(0, 64)).shape == (0, 48)


@exact
def test_a_base_in_8_bits_serves_adapters(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    adapters = {"r3": tiny_lora(base, tmp_path / "r3", r=3, alpha=6, targets=["o_proj"], seed=1)}
    chosen = kernels.select(CPU)
    model = load_base(base, "float32", CPU, chosen, quantization="int8")
    assert isinstance(model, AdaptedModel)
    prompts = [drawn(i, 20).mul(40).abs().long().clamp(3, 95).tolist() for i in range(2)]
    streams = [Stream(n, p, watched=True) for n, p in zip((None, "r3"), prompts, strict=True)]
    FlatRunner(model, adapters, chosen).run(streams, chunk=24, new_tokens=4)
    truth = Oracle(base, adapters)
    for stream in streams:
        wanted = truth.logits(stream.adapter, stream.tokens[:-1])
        other = truth.logits("r3" if stream.adapter is None else None, stream.tokens[:-1])
        found = torch.stack([stream.rows[p] for p in sorted(stream.rows)])
        off = (found - wanted).norm() / wanted.norm()
        assert 1e-4 < off < 0.05
        assert (found - other).norm() > 3 * (found - wanted).norm()


@pytest.mark.parametrize("wrong", [torch.gt, torch.lt])
def test_a_cpu_whose_products_are_wrong_is_refused(
    wrong: Callable[[torch.Tensor, int], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums that pass 16 bits on one side only."""

    def call(_: Int8Product, x: torch.Tensor) -> torch.Tensor:
        y = x @ weights[-1].T
        return torch.where(wrong(y, 0), y / 2, y)

    weights: list[torch.Tensor] = []
    monkeypatch.setattr(Int8Product, "__init__", lambda _, weight, __: weights.append(weight))
    monkeypatch.setattr(Int8Product, "__call__", call)
    base = tiny_model("llama", tmp_path)
    with pytest.raises(FailedPrecondition) as caught:
        load_base(base, "float32", CPU, kernels.select(CPU), quantization="int8")
    assert caught.value.field == "quantization"
    assert "VNNI" in str(caught.value)


def test_a_base_that_cannot_be_quantised(tmp_path: Path) -> None:
    base = tiny_model("gpt2", tmp_path)
    with pytest.raises(FailedPrecondition) as caught:
        load_base(base, "float32", CPU, kernels.select(CPU), quantization="int8")
    assert caught.value.field == "quantization"
