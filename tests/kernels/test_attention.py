"""Paged attention and the KV write of every backend, and in every ISA that runs here, against the
reference in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attention_steps import Step, error_bound, kept, make_step
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED, drawn

from manylora.kernels import Backend, cpu, reference
from manylora.kernels.attention import AttentionBatch, make_batch

SHAPES = {
    "tiny": {"heads": 6, "kv_heads": 2, "head_dim": 8, "block_size": 16},
    "odd": {"heads": 3, "kv_heads": 3, "head_dim": 6, "block_size": 48},
    "smollm2": {"heads": 9, "kv_heads": 3, "head_dim": 64, "block_size": 16},
    "phi": {"heads": 2, "kv_heads": 2, "head_dim": 80, "block_size": 32},
    "falcon": {"heads": 71, "kv_heads": 1, "head_dim": 12, "block_size": 32},
    "wide": {"heads": 4, "kv_heads": 1, "head_dim": 256, "block_size": 16},
}


def per_head(heads: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.01, 2, heads).astype(np.float32))


def check(backend: Backend, step: Step, dtype: torch.dtype, **options: Any) -> None:
    q, k_cache, v_cache, batch = step.tensors
    want = reference.paged_attention(q.float(), k_cache.float(), v_cache.float(), batch, **options)
    got = backend.paged_attention(q, *kept(backend, k_cache, v_cache), batch, **options)
    assert got.dtype == dtype and got.is_contiguous()
    error = (got.float() - want).abs() - error_bound(step, dtype, **options)
    assert (error <= 0).all(), f"beyond the bound by {error.max()}"


def options_of(heads: int) -> list[dict[str, Any]]:
    return [
        {},
        {"window": 1},
        {"window": 37, "softcap": 2.0},
        {"slopes": per_head(heads) / 10},
        {"sinks": per_head(heads) * 3, "window": 130},
        {"softcap": 20.0, "sinks": per_head(heads), "slopes": per_head(heads, 1)},
        {"window": 40, "softcap": 9.0, "sinks": per_head(heads), "slopes": per_head(heads, 1) / 5},
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(backend: Backend, shape: str, dtype: torch.dtype) -> None:
    """Decodes, chunks and a sequence without rows in one call. In the interpreter, each option
    in each dtype with a shape or two."""
    sizes = SHAPES[shape]
    rows, context = [1, 5, 0, 34, 3, 1], [9, 5, 3, 98, 641, 32]
    if INTERPRETED:
        rows, context = [1, 5, 0, 3, 1], [9, 5, 3, 20, 300]
    which = list(SHAPES).index(shape) + DTYPES.index(dtype)
    for seed, option in enumerate(options_of(sizes["heads"])):
        if INTERPRETED and (seed + which) % 5:
            continue
        window = option.get("window", 0)
        step = make_step(rows, context, dtype=dtype, window=window, seed=seed, **sizes)
        check(backend, step, dtype, scale=sizes["head_dim"] ** -0.5, **option)


@drawn(interpreted=6)
@given(data=st.data())
def test_drawn(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    draw = data.draw
    longest, most_rows, most_heads = (60, 20, 2) if INTERPRETED else (150, 70, 4)
    context = draw(st.lists(st.integers(1, longest), min_size=1, max_size=5))
    rows = [draw(st.integers(0, min(n, most_rows))) for n in context]
    kv_heads, group = draw(st.integers(1, most_heads)), draw(st.integers(1, 9))
    window = draw(st.sampled_from([0, 0, 1, 5, 33, 64]))
    step = make_step(
        rows,
        context,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 40)) * (2 if dtype == torch.bfloat16 else 1),
        block_size=draw(st.sampled_from([16, 32, 48])),
        dtype=dtype,
        window=window,
        seed=draw(st.integers(0, 9)),
    )
    extras = {
        name: per_head(kv_heads * group, 3) if draw(st.booleans()) else None
        for name in ("slopes", "sinks")
    }
    softcap = draw(st.sampled_from([0.0, 0.5, 30.0]))
    check(backend, step, dtype, scale=0.3, window=window, softcap=softcap, **extras)


def attend(backend: Backend, step: Step, **options: Any) -> torch.Tensor:
    caches = kept(backend, step.k_cache, step.v_cache)
    return backend.paged_attention(step.q, *caches, step.batch, scale=0.25, **options)


def part_of(step: Step, sequence: int, rows: int, context: int) -> Step:
    """The step in which only one sequence runs, with its last `rows` of a shorter context."""
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


@pytest.mark.parametrize("window", [0, 45])
def test_bits_do_not_depend_on_neighbours(
    backend: Backend, dtype: torch.dtype, window: int
) -> None:
    rows, context = [1, 30, 1, 1, 2, 90], [1100, 60, 33, 5, 700, 90]
    if INTERPRETED:
        rows, context = [1, 30, 1, 2], [300, 60, 33, 70]
    step = make_step(rows, context, heads=6, kv_heads=2, dtype=dtype, window=window)
    how: dict[str, Any] = {"window": window, "sinks": per_head(6)}
    together = attend(backend, step, **how)
    for s in range(len(rows)):
        alone = attend(backend, part_of(step, s, rows[s], context[s]), **how)
        assert torch.equal(alone, together[step.batch.seq_starts[s] : step.batch.seq_starts[s + 1]])


@pytest.mark.parametrize(("window", "head_dim"), [(0, 20), (21, 48)])
def test_bits_do_not_depend_on_chunks(
    kernels: Backend, dtype: torch.dtype, window: int, head_dim: int
) -> None:
    n = 70 if INTERPRETED else 570
    step = make_step([n], [n], heads=6, kv_heads=2, head_dim=head_dim, dtype=dtype)
    whole = attend(kernels, step, window=window, softcap=5.0)
    rng = np.random.default_rng(0)
    for most in (40,) if INTERPRETED else (1, 3, 40, 300):
        end = n if most > 1 else 70
        begin = 0
        while begin < end:
            rows = min(end - begin, int(rng.integers(1, most + 1)))
            part = part_of(step, 0, rows, begin + rows)
            chunk = attend(kernels, part, window=window, softcap=5.0)
            assert torch.equal(chunk, whole[begin : begin + rows]), (begin, rows)
            begin += rows


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")
@pytest.mark.usefixtures("two_threads")
def test_bits_do_not_depend_on_threads(kernels: Backend) -> None:
    step = make_step([1, 1, 130], [2600, 40, 1300], heads=6, kv_heads=2, dtype=torch.bfloat16)
    results = [attend(kernels, step) for _ in range(3)]
    torch.set_num_threads(1)
    results.append(attend(kernels, step))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_broken_neighbour_changes_nothing(backend: Backend, dtype: torch.dtype) -> None:
    step = make_step([1, 20, 4], [300, 40, 60 if INTERPRETED else 600], dtype=dtype)
    clean = attend(backend, step)
    for poison in (torch.nan, torch.inf, -torch.inf):
        blocks = torch.from_numpy(step.table[1, :3]).long()
        step.k_cache[blocks] = poison
        step.v_cache[blocks] = poison
        step.q[1:21] = poison
        broken = attend(backend, step)
        assert torch.equal(broken[:1], clean[:1]) and torch.equal(broken[21:], clean[21:])
        assert broken[1:21].isnan().all()


@pytest.mark.skipif(INTERPRETED, reason="where Triton's chunks promise no more than transformers")
@pytest.mark.parametrize("at", [17, 18])
def test_a_row_does_not_feel_later_or_forgotten_keys(
    kernels: Backend, dtype: torch.dtype, at: int
) -> None:
    step = make_step([40], [40], dtype=dtype)
    clean = attend(kernels, step, window=5)
    block, offset = int(step.table[0, at // 16]), at % 16
    step.k_cache[block, :, offset] = torch.nan
    step.v_cache[block, :, offset] = torch.nan
    broken = attend(kernels, step, window=5)
    feels = torch.zeros(40, dtype=torch.bool)
    feels[at : at + 5] = True
    assert broken[feels].isnan().all()
    assert torch.equal(broken[~feels], clean[~feels])


def test_strided_queries(backend: Backend, dtype: torch.dtype) -> None:
    step = make_step([1, 9], [30, 40], heads=4, dtype=dtype)
    want = attend(backend, step)
    qkv = torch.full((10, 4 * 16 + 70), torch.nan, dtype=dtype)
    qkv[:, 3 : 3 + 64] = step.q.flatten(1)
    heads_first = step.q.transpose(0, 1).contiguous().transpose(0, 1)
    for step.q in (qkv[:, 3 : 3 + 64].view(10, 4, 16), heads_first):
        got = attend(backend, step)
        assert got.is_contiguous()
        # torch's products, the reference's, may sum otherwise where strides differ.
        units = max(1e-5, 2 * torch.finfo(dtype).eps)
        rounding = units if backend.NAME == "reference" else 0
        torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)


def test_shared_prefix_blocks(backend: Backend) -> None:
    step = make_step([4, 4], [40, 40])
    table = step.table.copy()
    table[1, :2] = table[0, :2]
    step.batch = make_batch(np.array([4, 4], np.int32), np.array([40, 40], np.int32), table, 16)
    want = reference.paged_attention(*step.tensors, scale=0.25)
    torch.testing.assert_close(attend(backend, step), want)


def test_batches_of_one_kind_and_of_unknown_kind(backend: Backend) -> None:
    for rows in ([1, 1, 1], [3, 0, 2], [1, 3, 0]):
        step = make_step(rows, [40, 9, 30])
        want = reference.paged_attention(*step.tensors, scale=0.25)
        torch.testing.assert_close(attend(backend, step), want)
        known = step.batch
        assert (known.decodes, known.chunks) == (rows.count(1), 3 - rows.count(1) - rows.count(0))
        step.batch = AttentionBatch(
            known.seq_starts, known.context, known.block_table, known.slot_mapping
        )
        torch.testing.assert_close(attend(backend, step), want)


def test_all_scores_minus_infinity_until_late(backend: Backend) -> None:
    step = make_step([1], [700], heads=1, kv_heads=1)
    blocks = torch.from_numpy(step.table[0, :40]).long()
    step.q.fill_(1.0)
    step.k_cache[blocks] = -torch.inf
    want = reference.paged_attention(*step.tensors, scale=0.25)
    assert not want.isnan().any()
    torch.testing.assert_close(attend(backend, step), want)


def test_no_rows(backend: Backend) -> None:
    step = make_step([0, 0], [5, 9])
    assert attend(backend, step).shape == (0, 4, 16)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 2), (2, 8), (9, 64), (3, 80)])
def test_write_kv(backend: Backend, dtype: torch.dtype, kv_heads: int, head_dim: int) -> None:
    step = make_step(
        [1, 40, 0, 7],
        [9, 40, 3, 90],
        heads=kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    rows = step.batch.rows
    kv = torch.randn(rows, 3, kv_heads, head_dim).to(dtype)  # strided: between them lies something
    guarded = torch.full((2, step.k_cache.numel() + 64), 7.0, dtype=dtype)
    caches = [row[32:-32].view_as(step.k_cache) for row in guarded]
    wanted = [torch.full_like(cache, 7.0) for cache in caches]
    backend.write_kv(kv[:, 0], kv[:, 2], *caches, step.batch)
    reference.write_kv(kv[:, 0], kv[:, 2], *wanted, step.batch)
    assert torch.equal(torch.stack(caches), torch.stack(kept(backend, *wanted)))
    assert (guarded[:, :32] == 7).all() and (guarded[:, -32:] == 7).all()


def test_misfits_are_refused(kernels: Backend) -> None:
    step = make_step([2], [9])
    q, k_cache, v_cache, batch = step.tensors
    k = q[:, :2]
    wrong: list[tuple[Any, ...]] = [
        (q[:1], k_cache, v_cache),
        (q.half(), k_cache, v_cache),
        (q[:, :3], k_cache, v_cache),
        (q[..., :8], k_cache, v_cache),
        (q[..., ::2], k_cache[..., :8].contiguous(), v_cache[..., :8].contiguous()),
        (q, k_cache, v_cache[:, :1].contiguous()),
        (q, k_cache.transpose(1, 2), v_cache),
    ]
    for tensors in wrong:
        with pytest.raises(ValueError, match="attention: wanted"):
            kernels.paged_attention(*tensors, batch, scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        kernels.paged_attention(q, k_cache, v_cache, batch, scale=1.0, sinks=torch.zeros(3))
    for keys, values in ((k[:1], k[:1]), (q, q), (k.half(), k), (k, k[..., :4])):
        with pytest.raises(ValueError, match="attention: wanted"):
            kernels.write_kv(keys, values, k_cache, v_cache, batch)


@pytest.mark.skipif(not cpu.available() or INTERPRETED, reason="blocks of the C++ kernels")
def test_blocks_that_do_not_fit_the_cpu_are_refused() -> None:
    q, _, _, batch = make_step([2], [9]).tensors
    small, odd = torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 16, 15, dtype=torch.bfloat16)
    for cache, queries in ((small, q), (odd, q[..., :15].to(odd.dtype))):
        with pytest.raises(ValueError, match="block_size that is a multiple of 16"):
            cpu.paged_attention(queries, cache, cache, batch, scale=1.0)
