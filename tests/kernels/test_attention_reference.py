"""The reference against the formula, written out row by row and head by head in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from manylora.kernels.attention import make_batch, row_positions
from manylora.kernels.reference_attention import paged_attention, write_kv

BLOCK = 4
ROWS = np.array([1, 5, 0, 7], np.int32)
CONTEXT = np.array([9, 5, 3, 20], np.int32)
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def written_out(q, keys, values, kv_of_row, position, *, scale, window, softcap, slopes, sinks):
    out = np.zeros(q.shape)
    for row, head in np.ndindex(q.shape[:2]):
        s, kv_head = kv_of_row[row], head // (HEADS // KV_HEADS)
        scores = []
        first = max(0, position[row] - window + 1) if window else 0
        for t in range(first, position[row] + 1):
            score = float(q[row, head] @ keys[s][t, kv_head]) * scale
            score = softcap * math.tanh(score / softcap) if softcap else score
            scores.append(
                score + (slopes[head] * (t - position[row]) if slopes is not None else 0.0)
            )
        exps = [math.exp(score) for score in scores]
        total = sum(exps) + (math.exp(sinks[head]) if sinks is not None else 0.0)
        for t, e in enumerate(exps, first):
            out[row, head] += e / total * values[s][t, kv_head]
    return out


@pytest.mark.parametrize("window", [0, 1, 6])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("extras", [False, True])
def test_formula(window: int, softcap: float, extras: bool) -> None:
    rng = np.random.default_rng(1)
    table = rng.permutation(64)[: 4 * 6].reshape(4, 6).astype(np.int32)
    batch = make_batch(ROWS, CONTEXT, table, BLOCK)
    keys = [rng.standard_normal((n, KV_HEADS, HEAD_DIM)) for n in CONTEXT]
    values = [rng.standard_normal((n, KV_HEADS, HEAD_DIM)) for n in CONTEXT]
    q = rng.standard_normal((ROWS.sum(), HEADS, HEAD_DIM))
    slopes = rng.uniform(0.1, 0.5, HEADS) if extras else None
    sinks = rng.standard_normal(HEADS) if extras else None
    k_cache = torch.full((64, KV_HEADS, BLOCK, HEAD_DIM), math.nan)
    v_cache = torch.full_like(k_cache, math.nan)
    for s, n in enumerate(CONTEXT):
        whole = make_batch(np.array([n], np.int32), CONTEXT[s : s + 1], table[s : s + 1], BLOCK)
        k, v = (torch.from_numpy(x[s]).float() for x in (keys, values))
        write_kv(k, v, k_cache, v_cache, whole)
    options = {"scale": 0.4, "window": window, "softcap": softcap}
    got = paged_attention(
        torch.from_numpy(q).float(),
        k_cache,
        v_cache,
        batch,
        slopes=None if slopes is None else torch.from_numpy(slopes).float(),
        sinks=None if sinks is None else torch.from_numpy(sinks).float(),
        **options,
    )
    sequence = np.repeat(np.arange(4), ROWS)
    position = row_positions(ROWS, CONTEXT)
    want = written_out(q, keys, values, sequence, position, slopes=slopes, sinks=sinks, **options)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)


def test_positions_and_slots() -> None:
    table = np.arange(24, dtype=np.int32).reshape(4, 6)[::-1].copy()
    batch = make_batch(ROWS, CONTEXT, table, BLOCK)
    assert batch.seq_starts.tolist() == [0, 1, 6, 6, 13]
    assert row_positions(ROWS, CONTEXT).tolist() == [8, *range(5), *range(13, 20)]
    assert batch.slot_mapping.tolist()[:3] == [20 * 4, 12 * 4, 12 * 4 + 1]


def test_rejects_what_does_not_fit() -> None:
    table = np.zeros((1, 2), np.int32)
    one = np.array([1], np.int32)
    with pytest.raises(ValueError, match="row_counts"):
        make_batch(one * 3, one, table, BLOCK)
    with pytest.raises(ValueError, match="block_table: found room for 8 positions; wanted 9"):
        make_batch(one, one * 9, table, BLOCK)
