"""The kernel benchmark: what it compares computes the same, its arithmetic is right."""

from __future__ import annotations

import json

import kernels_gpu as gpu
import pytest
import torch
from kernels_attention import Attention, Heads, call_costs
from kernels_bars import Bar, as_json
from kernels_edits import Case, Edits
from kernels_timing import Ring, medians
from kernels_training import Training

from manylora.kernels import cpu

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())


def test_the_ring_hands_out_disjoint_pieces_and_starts_again() -> None:
    ring = Ring(1 << 12)
    count = ring.fits(100)
    starts = [ring.take(100) for _ in range(count + 1)]
    assert starts[: count + 1] == [*range(0, 128 * count, 128), 0]
    assert 128 * count <= len(ring.values) < 128 * (count + 1)
    assert ring.values.isfinite().all() and ring.values.abs().sum() > 0


def test_calls_take_turns_and_see_every_turn_once() -> None:
    first: list[int] = []
    second: list[int] = []
    found = medians([first.append, second.append], budget=0)
    assert len(found) == 2 and min(found) > 0
    assert min(len(first), len(second)) > 5
    assert not set(first[1:]) & set(second[1:])
    assert first[1] < second[1] < first[-1]


@needs_library
@pytest.mark.parametrize("case", [Case(5, 5, 4, 40, 64), Case(6, 2, 8, 34, 96)], ids=str)
def test_the_ways_that_are_compared_compute_the_same(case: Case) -> None:
    ring = Ring(1 << 16)
    ring.take(1700)  # so that a walk from here on would meet the end of the ring
    edits = Edits(case, ring)
    edits.bmm(2)
    by_bmm = edits.y.clone()
    edits.y.zero_()
    edits.einsum(2)
    by_einsum = edits.y.clone()
    assert by_bmm.abs().max() > 0
    for module in range(edits.modules):
        edits.y.zero_()
        edits.ours(module)
        torch.testing.assert_close(edits.y, by_bmm, rtol=0.03, atol=1e-4)
    torch.testing.assert_close(by_einsum, by_bmm, rtol=0.03, atol=1e-4)


@needs_library
def test_attention_walks_through_layers() -> None:
    of = Heads(4, 2, 8)
    step = Attention(of, sequences=3, context=20, ring=Ring(1 << 15))
    assert step.nbytes == 3 * 20 * 2 * 2 * 8 * 2
    assert len({cache.data_ptr() for cache in step.caches}) == len(step.caches) > 1
    step.ours(1)


@needs_library
def test_both_ways_of_training_compute_the_same() -> None:
    ours, torchs = Training(Case(12, 3, 4, 40, 64)), Training(Case(12, 3, 4, 40, 64))
    for name in ("x", "y", "dx", "dy", "a", "bt"):
        getattr(torchs, name).copy_(getattr(ours, name))
    before = ours.y.clone()
    ours.forward(0)
    torchs.torch_forward(0)
    assert not torch.equal(ours.y, before)
    ours.backward(0)
    torchs.torch_backward(0)
    for name in ("y", "dx", "da", "dbt"):
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name), rtol=0.05, atol=0.2)


@needs_library
def test_every_call_with_a_bar_is_timed() -> None:
    assert {"apply_edits_", "write_kv", "paged_attention"} <= call_costs(budget=0).ours.keys()


def test_predictions() -> None:
    """By hand: Llama-3-8B's layer, rank 16, one row each of 32 adapters."""
    sizes = [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)]
    cases = [Case(32, 32, 16, *size) for size in sizes]
    assert sum(case.nbytes for case in cases) == 32 * 163_840 * 16
    q = cases[0]
    x_and_y, planes = 32 * (4096 + 2 * 4096) * 2, 2 * 32 * 16 * 8 * 4
    work = gpu.edits(q)
    assert work.nbytes == q.nbytes + x_and_y + planes
    assert work.us == pytest.approx(work.nbytes / 3.35e6 + 5)
    assert gpu.linear_with_edits(q).nbytes < work.nbytes + gpu.base(32, 4096, 4096).nbytes
    assert gpu.base(4096, 4096, 4096).us == pytest.approx(2 * 4096**3 / 989e6 + 2.5)


def test_bars() -> None:
    bars = [Bar("low", 1.2, 1.3), Bar("high", 7.9, 8, at_least=True)]
    assert [bar.holds for bar in bars] == [True, False]
    assert json.loads(json.dumps(as_json(bars))) == {
        "bars": {
            "low": {"value": 1.2, "bar": 1.3, "holds": True},
            "high": {"value": 7.9, "bar": 8, "holds": False},
        }
    }
