"""Paged attention and the KV write in Triton's interpreter, against the reference.

Not collected by itself: test_triton.py runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from attention_steps import Step, error_bound, make_step

import manylora.kernels.triton as kernels
from manylora.kernels import reference, reference_small
from manylora.kernels.attention import AttentionBatch, make_batch

SHAPES = {
    "tiny": {"heads": 6, "kv_heads": 2, "head_dim": 8, "block_size": 4},
    "odd": {"heads": 3, "kv_heads": 3, "head_dim": 7, "block_size": 12},
    "wide": {"heads": 4, "kv_heads": 1, "head_dim": 192, "block_size": 16},
    "many": {"heads": 35, "kv_heads": 1, "head_dim": 64, "block_size": 16},
}


def per_head(heads: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.01, 2, heads).astype(np.float32))


def check(step: Step, dtype: torch.dtype, **options: Any) -> None:
    q, k_cache, v_cache, batch = step.tensors
    want = reference.paged_attention(q.float(), k_cache.float(), v_cache.float(), batch, **options)
    got = kernels.paged_attention(q, k_cache, v_cache, batch, **options)
    assert got.dtype == dtype and got.is_contiguous()
    error = (got.float() - want).abs() - error_bound(step, dtype, **options)
    assert (error <= 0).all(), f"beyond the bound by {error.max()}"


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape: str, number: int) -> None:
    sizes = SHAPES[shape]
    heads = sizes["heads"]
    options: list[dict[str, Any]] = [
        {},
        {"window": 1},
        {"window": 37, "softcap": 2.0},
        {"slopes": per_head(heads) / 10},
        {"sinks": per_head(heads) * 3, "window": 270},
        {"softcap": 20.0, "sinks": per_head(heads), "slopes": per_head(heads, 1)},
    ]
    option = options[number]
    dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
    window = option.get("window", 0)
    rows, context = [1, 5, 0, 1, 3], [9, 5, 3, 541, 20]
    step = make_step(rows, context, dtype=dtype, window=window, seed=number, **sizes)
    check(step, dtype, scale=sizes["head_dim"] ** -0.5, **option)


def attend(step: Step, **options: Any) -> torch.Tensor:
    return kernels.paged_attention(*step.tensors, scale=0.25, **options)


def part_of(step: Step, sequence: int, rows: int, context: int) -> Step:
    """The step in which only one sequence runs, with `rows` rows that end at `context`."""
    begin = int(step.batch.seq_starts[sequence])
    first = int(step.batch.context[sequence]) - int(step.batch.seq_starts[sequence + 1]) + begin
    end = begin + context - first
    batch = make_batch(
        np.array([rows], np.int32),
        np.array([context], np.int32),
        step.table[sequence : sequence + 1],
        step.k_cache.shape[2],
    )
    q = step.q[end - rows : end]
    return Step(q, step.k_cache, step.v_cache, batch, step.table, step.keys, step.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_neighbours(dtype: torch.dtype) -> None:
    rows, context = [1, 30, 1, 2], [300, 60, 33, 70]
    step = make_step(rows, context, dtype=dtype, window=45)
    together = attend(step, window=45, sinks=per_head(4))
    for s in range(len(rows)):
        alone = attend(part_of(step, s, rows[s], context[s]), window=45, sinks=per_head(4))
        assert torch.equal(alone, together[step.batch.seq_starts[s] : step.batch.seq_starts[s + 1]])


@pytest.mark.parametrize("window", [0, 21])
def test_bits_do_not_depend_on_chunks(window: int) -> None:
    step = make_step([80], [80], head_dim=20, block_size=8, dtype=torch.bfloat16)
    whole = attend(step, window=window, softcap=5.0)
    for begin, end in ((0, 33), (33, 35), (35, 80)):
        chunk = attend(part_of(step, 0, end - begin, end), window=window, softcap=5.0)
        assert torch.equal(chunk, whole[begin:end]), (begin, end)


def test_a_broken_neighbour_changes_nothing() -> None:
    step = make_step([1, 20, 4], [300, 40, 60], dtype=torch.bfloat16)
    clean = attend(step)
    for poison in (torch.nan, torch.inf):
        blocks = torch.from_numpy(step.table[1, :3]).long()
        step.k_cache[blocks] = poison
        step.v_cache[blocks] = poison
        step.q[1:21] = poison
        broken = attend(step)
        assert torch.equal(broken[:1], clean[:1]) and torch.equal(broken[21:], clean[21:])
        assert broken[1:21].isnan().all()


def test_batches_of_one_kind_and_of_unknown_kind() -> None:
    for rows in ([1, 1, 1], [3, 0, 2], [1, 3, 0]):
        step = make_step(rows, [40, 9, 30])
        want = reference.paged_attention(*step.tensors, scale=0.25)
        torch.testing.assert_close(attend(step), want)
        known = step.batch
        assert (known.decodes, known.chunks) == (rows.count(1), 3 - rows.count(1) - rows.count(0))
        step.batch = AttentionBatch(
            known.seq_starts, known.context, known.block_table, known.slot_mapping
        )
        torch.testing.assert_close(attend(step), want)


def test_strided_queries() -> None:
    step = make_step([1, 9], [30, 40])
    want = attend(step)
    packed = torch.full((10, 4 * 16 + 70), torch.nan)
    packed[:, 3 : 3 + 64] = step.q.flatten(1)
    heads_first = step.q.transpose(0, 1).contiguous().transpose(0, 1)
    for q in (packed[:, 3 : 3 + 64].view(10, 4, 16), heads_first):
        got = kernels.paged_attention(q, *step.tensors[1:], scale=0.25)
        assert got.is_contiguous() and torch.equal(got, want)


def test_all_scores_minus_infinity_until_late() -> None:
    step = make_step([1], [600], heads=1, kv_heads=1)
    blocks = torch.from_numpy(step.table[0, :34]).long()
    step.q.fill_(1.0)
    step.k_cache[blocks] = -torch.inf
    torch.testing.assert_close(attend(step), reference.paged_attention(*step.tensors, scale=0.25))


def test_no_rows() -> None:
    step = make_step([0, 0], [5, 9])
    assert attend(step).shape == (0, 4, 16)


def guarded_caches(step: Step) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Two caches in a buffer of sevens with a margin around each."""
    buffer = torch.full((2, step.k_cache.numel() + 64), 7.0, dtype=step.q.dtype)
    return buffer, [row[32:-32].view_as(step.k_cache) for row in buffer]


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 16), (9, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv(dtype: torch.dtype, kv_heads: int, head_dim: int) -> None:
    step = make_step(
        [1, 14, 0, 3], [9, 20, 3, 30], heads=kv_heads, kv_heads=kv_heads, head_dim=head_dim
    )
    step.q = step.q.to(dtype)
    kv = torch.randn(step.batch.rows, 3, kv_heads, head_dim).to(dtype)
    buffer, caches = guarded_caches(step)
    wanted, wanted_caches = guarded_caches(step)
    kernels.write_kv(kv[:, 0], kv[:, 2], *caches, step.batch)
    reference.write_kv(kv[:, 0], kv[:, 2], *wanted_caches, step.batch)
    assert torch.equal(buffer, wanted)


def test_padding_rows_write_nothing() -> None:
    step = make_step([2, 3], [9, 20])
    step.batch.slot_mapping[1] = -1
    buffer, caches = guarded_caches(step)
    kernels.write_kv(step.q[:, :2], step.q[:, 2:], *caches, step.batch)
    assert int((buffer != 7).sum()) == 2 * 4 * 2 * 16


@pytest.mark.parametrize("half", [3, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_write_kv(dtype: torch.dtype, half: int) -> None:
    step = make_step([1, 4], [9, 20], heads=7, kv_heads=1, head_dim=40)
    step.q = step.q.to(dtype)
    wide = torch.randn(5, 9 * 40 + 13).to(dtype)
    qkv, wanted_qkv = wide.clone(), wide.clone()
    angles = torch.rand(5, half) * 6
    buffer, caches = guarded_caches(step)
    wanted, wanted_caches = guarded_caches(step)
    cos, sin = angles.cos(), angles.sin()
    arguments = cos, sin, *caches, step.batch
    q = kernels.rotary_write_kv(qkv[:, : 9 * 40], *arguments)
    reference_small.rotary_write_kv(wanted_qkv[:, : 9 * 40], cos, sin, *wanted_caches, step.batch)
    assert q.data_ptr() == qkv.data_ptr() and q.shape == (5, 7, 40)
    unit = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(qkv, wanted_qkv, rtol=unit, atol=unit)
    torch.testing.assert_close(buffer, wanted, rtol=unit, atol=unit)
    assert torch.equal(qkv[:, 7 * 40 :], wanted_qkv[:, 7 * 40 :])
    assert torch.equal(buffer[1], wanted[1])


def refuse(tensors: Sequence[torch.Tensor], batch: AttentionBatch) -> None:
    with pytest.raises(ValueError, match="attention: wanted"):
        kernels.paged_attention(*tensors, batch, scale=1.0)


def test_misfits_are_refused() -> None:
    step = make_step([2], [9])
    q, k_cache, v_cache, batch = step.tensors
    refuse((q[:1], k_cache, v_cache), batch)
    refuse((q.half(), k_cache, v_cache), batch)
    refuse((q[:, :3], k_cache, v_cache), batch)
    refuse((q[..., ::2], k_cache[..., :8].contiguous(), v_cache[..., :8].contiguous()), batch)
    refuse((q, k_cache.transpose(1, 2), v_cache), batch)
    with pytest.raises(ValueError, match="sinks: found"):
        kernels.paged_attention(q, k_cache, v_cache, batch, scale=1.0, sinks=torch.zeros(3))
    for keys, values in ((q[:1, :2], q[:1, :2]), (q, q), (q[:, :2], q[:, :2, :4])):
        with pytest.raises(ValueError, match="attention: wanted"):
            kernels.write_kv(keys, values, k_cache, v_cache, batch)
