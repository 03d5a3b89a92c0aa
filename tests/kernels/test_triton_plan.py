"""The Triton kernels' tile plan comes from shapes and the GPU, never from the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, drawn

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("launches are not those of a GPU", allow_module_level=True)

from triton.runtime.jit import JITFunction

import manylora.kernels.triton as kernels
from manylora.kernels import EditTable, SliceGroup, make_batch, make_plan
from manylora.kernels.triton import tiles

TARGETS = {
    "ampere": tiles.Target("cuda", 163 << 10),
    "hopper": tiles.Target("cuda", 227 << 10),
    "blackwell": tiles.Target("cuda", 227 << 10, tensor_memory=True),
    "mi300": tiles.Target("hip", 64 << 10),
}
IN_SIZE, SIZES = 4096, (4096, 1024, 1024)
Launch = tuple[str, tuple[tuple[str, Any], ...]]


@pytest.fixture(params=TARGETS)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels and their tiles, warps and stages, as they would be launched on a GPU."""
    found: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        if kernel.fn.__name__ == "_shrink":
            assert grid[2] == options["SPLITS"]
        found.append((kernel.fn.__name__, tuple(sorted(options.items()))))

    monkeypatch.setattr(JITFunction, "run", note)
    monkeypatch.setattr(tiles, "target", lambda: TARGETS[request.param])
    return found


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def serve(slots: list[int], rank: int, contexts: list[int]) -> None:
    """A step's edits on all rows; attention of decodes and of one chunk."""
    rows, modules = len(slots), len(SIZES)
    table = EditTable(8, modules, "meta")
    offsets = np.zeros((modules, 5), np.int64)
    offsets[:, 2] = -1
    for slot in set(slots) - {-1}:
        row = np.full(modules, rank, np.int32), np.ones(modules, np.float32)
        table.write(slot, *row, offsets)
    group = SliceGroup((0, 1, 2), (0, 4096, 5120), SIZES)
    plan = make_plan(np.array(slots, np.int32), "meta")
    x, pool, weight = meta(rows, IN_SIZE), meta(1 << 10), meta(sum(SIZES), IN_SIZE)
    kernels.apply_edits_(meta(rows, sum(SIZES)), x, group, pool, table, plan)
    kernels.linear_with_edits(x, weight, None, group, pool, table, plan)
    counts = np.array([1] * len(contexts) + [7], np.int32)
    lengths = np.array([*contexts, 300], np.int32)
    width = -(-max(300, *contexts) // 16)
    batch = make_batch(counts, lengths, np.zeros((len(counts), width), np.int32), 16, "meta")
    cache = meta(512, 8, 16, 128)
    kernels.paged_attention(meta(batch.rows, 32, 128), cache, cache, batch, scale=0.1)


@drawn(interpreted=1)
@given(
    slots=st.lists(st.integers(-1, 7), min_size=1, max_size=300).filter(lambda s: max(s) >= 0),
    rank=st.integers(1, 256),
    contexts=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
)
def test_no_tile_depends_on_the_batch(
    launches: list[Launch], slots: list[int], rank: int, contexts: list[int]
) -> None:
    launches.clear()
    serve([0], 16, [300])
    alone = list(launches)
    launches.clear()
    serve(slots, rank, contexts)
    assert {name for name, _ in launches} >= {"_shrink", "_expand", "_product", "_attend"}
    assert list(launches) == alone


@pytest.mark.parametrize("in_size", [1, 576, 896, 4096, 4864, 14336, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_cover_every_column_once(in_size: int, dtype: torch.dtype) -> None:
    for on in TARGETS.values():
        plan = tiles.shrink_tiles(in_size, dtype, on)
        assert plan.splits <= tiles.MOST_SPLITS
        assert (plan.splits - 1) * plan.chunk < in_size <= plan.splits * plan.chunk
        assert plan.chunk % plan.k == 0
