"""A stack of layers refuses what does not fit; what it computes is tested on whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from manylora import kernels
from manylora.kernels import EditTable, SliceGroup, cpu
from manylora.kernels.cpu import attention

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 64, 96, 4, 2, 16, 16
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
SIZES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INNER, HIDDEN)} | {
    "down": (HIDDEN, INNER)
}


def layer(**sizes: tuple[int, int]) -> cpu.DecoderLayer:
    """sizes: (out, in) of projections that are not as the others."""
    cache = torch.zeros(1, KV_HEADS, BLOCK, HEAD_DIM, dtype=torch.bfloat16)
    weights = [torch.randn(*size).bfloat16() for size in (SIZES | sizes).values()]
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return cpu.DecoderLayer(
        [
            cpu.DecoderProjection(
                cpu.PackedWeight(w, cpu.HugeArena()), None, SliceGroup.single(i, len(w))
            )
            for i, w in enumerate(weights)
        ],
        [norm, None, norm, None, None, None],
        cache,
        cache.clone(),
        attention.layer(HEADS, cache, cache, scale=1.0),
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {"qkv": (QKV - HEAD_DIM, HIDDEN)},
        {"o": (HIDDEN, HIDDEN + 32)},
        {"o": (HIDDEN + 16, HIDDEN)},
        {"gate_up": (2 * INNER - 16, HIDDEN)},
        {"gate_up": (2 * INNER, HIDDEN + 32)},
        {"down": (HIDDEN + 16, INNER)},
    ],
    ids=str,
)
def test_a_layer_whose_parts_do_not_fit(sizes: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="decoder_layers"):
        cpu.DecoderLayers([layer(), layer(**sizes)], "silu", 1e-5, 0.0)


def _with_bias(bias: torch.Tensor) -> cpu.DecoderLayer:
    made = layer()
    first = replace(made.projections[0], bias=bias)
    return replace(made, projections=[first, *made.projections[1:]])


def _with_attention(cache: torch.Tensor) -> cpu.DecoderLayer:
    return replace(layer(), attention=attention.layer(HEADS, cache, cache, scale=1.0))


def _with_norm(place: int, norm: torch.Tensor) -> cpu.DecoderLayer:
    made = layer()
    return replace(made, norms=[norm if i == place else n for i, n in enumerate(made.norms)])


@pytest.mark.parametrize(
    "broken",
    [
        lambda: _with_bias(torch.zeros(QKV)),
        lambda: _with_bias(torch.zeros(QKV - 1, dtype=torch.bfloat16)),
        lambda: _with_norm(0, torch.ones(HIDDEN)),
        lambda: _with_norm(1, torch.ones(HIDDEN + 1, dtype=torch.bfloat16)),
        lambda: _with_norm(4, torch.ones(2 * HEAD_DIM, dtype=torch.bfloat16)[::2]),
        lambda: replace(layer(), k_cache=layer().k_cache.transpose(1, 2)),
        lambda: replace(layer(), v_cache=layer().v_cache.float()),
        lambda: _with_attention(torch.zeros(1, KV_HEADS, BLOCK, HEAD_DIM)),
    ],
)
def test_vectors_and_caches_that_do_not_fit(broken: Callable[[], cpu.DecoderLayer]) -> None:
    with pytest.raises(ValueError, match="decoder_layers"):
        cpu.DecoderLayers([layer(), broken()], "silu", 1e-5, 0.0)


def test_layers_of_several_sizes() -> None:
    wider = layer(gate_up=(2 * INNER + 64, HIDDEN), down=(HIDDEN, INNER + 32))
    with pytest.raises(ValueError, match="several sizes"):
        cpu.DecoderLayers([layer(), wider], "silu", 1e-5, 0.0)


@pytest.mark.parametrize("misfit", ["", "half", "pool", "modules", "rows", "dtype"])
def test_a_step_that_does_not_fit(misfit: str) -> None:
    layers = cpu.DecoderLayers([layer(), layer()], "silu", 1e-5, 0.0)
    one = np.ones(1, np.int32)
    batch = kernels.make_batch(one, one, np.zeros((1, 1), np.int32), BLOCK)
    half = HEAD_DIM if misfit == "half" else HEAD_DIM // 2
    rows = 2 if misfit == "rows" else 1
    x = torch.ones(rows, HIDDEN, dtype=torch.float32 if misfit == "dtype" else torch.bfloat16)
    pool = torch.zeros(8, dtype=torch.float32 if misfit == "pool" else torch.bfloat16)
    table = EditTable(1, 3 if misfit == "modules" else 4)
    angles = torch.zeros(1, 1, half)
    plan = kernels.make_plan(np.zeros(1, np.int32))
    if not misfit:
        layers.run_(x, angles, angles, pool, table, plan, batch)
        assert x.isfinite().all()
        return
    with pytest.raises(ValueError, match="decoder_layers: wanted"):
        layers.run_(x, angles, angles, pool, table, plan, batch)
