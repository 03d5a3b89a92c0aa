"""What only Triton's paged attention and KV write do, in its interpreter: blocks of any size, and
rows that pad a captured graph. Everything else is in test_attention.py and test_small.py.

Not collected by itself: test_triton.py runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from attention_steps import Step, error_bound, make_step

import manylora.kernels.triton as kernels
from manylora.kernels import reference


@pytest.mark.parametrize("block_size", [1, 4, 12])
def test_blocks_of_any_size(block_size: int, dtype: torch.dtype) -> None:
    step = make_step(
        [1, 5, 1], [9, 20, 270], kv_heads=1, head_dim=7, block_size=block_size, dtype=dtype
    )
    q, k_cache, v_cache, batch = step.tensors
    how = {"scale": 0.3, "window": 37, "softcap": 2.0}
    want = reference.paged_attention(q.float(), k_cache.float(), v_cache.float(), batch, **how)
    got = kernels.paged_attention(*step.tensors, **how)
    assert ((got.float() - want).abs() <= error_bound(step, dtype, **how)).all()


def guarded_caches(step: Step) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Two caches in a buffer of sevens with a margin around each."""
    buffer = torch.full((2, step.k_cache.numel() + 64), 7.0, dtype=step.q.dtype)
    return buffer, [row[32:-32].view_as(step.k_cache) for row in buffer]


def test_padding_rows_write_nothing() -> None:
    step = make_step([2, 3], [9, 20])
    step.batch.slot_mapping[1] = -1
    buffer, caches = guarded_caches(step)
    kernels.write_kv(step.q[:, :2], step.q[:, 2:], *caches, step.batch)
    assert int((buffer != 7).sum()) == 2 * 4 * 2 * 16


def test_padding_rows_write_nothing_rotated() -> None:
    step = make_step([2, 3], [9, 20])
    step.batch.slot_mapping[1] = -1
    buffer, caches = guarded_caches(step)
    angles = torch.ones(5, 3)
    kernels.rotary_write_kv(torch.randn(5, 6 * 16), angles, angles, *caches, step.batch)
    assert int((buffer != 7).sum()) == 2 * 4 * 2 * 16
