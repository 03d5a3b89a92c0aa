"""Arenas in the pool, and adapters packed for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit
from manylora.kernels import reference
from manylora.server.engine.packing import ALIGNMENT, pack
from manylora.server.engine.pool import Arena, Pool

CPU = torch.device("cpu")


def make_pool(elements: int) -> Pool:
    return Pool(elements * 4, torch.float32, CPU)


def fill(pool: Pool, arena: Arena, value: int) -> None:
    pool.tensor[arena.start : arena.start + arena.size] = value


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("allocate"), st.integers(0, 40)),
            st.tuples(st.just("free"), st.integers(0, 100)),
            st.tuples(st.just("compact"), st.just(0)),
        ),
        max_size=60,
    )
)
def test_arenas_keep_what_is_written_to_them(steps: list[tuple[str, int]]) -> None:
    pool = make_pool(100)
    arenas: dict[int, Arena] = {}
    for number, (step, value) in enumerate(steps):
        used = sum(arena.size for arena in arenas.values())
        if step == "allocate":
            arena = pool.allocate(value)
            if arena is not None:
                assert arena.size == value
                arenas[number] = arena
                fill(pool, arena, number)
            elif used + value <= 100:
                pool.compact()
                again = pool.allocate(value)
                assert again is not None, "compaction did not make one gap of all that is free"
                arenas[number] = again
                fill(pool, again, number)
        elif step == "free" and arenas:
            pool.free(arenas.pop(sorted(arenas)[value % len(arenas)]))
        elif step == "compact":
            pool.compact()
        assert pool.used == sum(arena.size for arena in arenas.values())
        for key, arena in arenas.items():
            assert (pool.tensor[arena.start : arena.start + arena.size] == key).all()


def test_equal_arenas_are_told_apart() -> None:
    pool = make_pool(10)
    first, second = pool.allocate(0), pool.allocate(0)
    assert first is not None
    assert second is not None
    third = pool.allocate(10)
    assert third is not None
    pool.free(first)
    pool.free(third)
    assert pool.used == 0
    assert pool.allocate(11) is None


def edits(seed: int, dtype: torch.dtype) -> dict[str, ModuleEdit]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "up": ModuleEdit(a=random(3, 5), b=random(7, 3), scale=0.5),
        "norm": ModuleEdit(out_scale=random(9), bias=random(9)),
        "down": ModuleEdit(a=random(1, 33), b=random(5, 1), in_scale=random(33), bias=random(5)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 64])
def test_packed_tensors_lie_where_the_table_says(dtype: torch.dtype, start: int) -> None:
    modules = {"up": 0, "gate": 1, "norm": 2, "down": 3}
    lowered = LoweredAdapter(edits(1, torch.float64))
    packed = pack(lowered, modules, reference, dtype)
    assert packed.buffer.dtype == dtype
    assert packed.bytes == packed.buffer.numel() * dtype.itemsize
    pool = torch.full((start + packed.buffer.numel(),), -7, dtype=dtype)
    pool[start:] = packed.buffer
    offsets = packed.offsets_at(start)
    assert packed.rank.tolist() == [3, 0, 0, 1]
    assert (offsets[1] == -1).all()
    assert ((offsets < 0) == (packed.offsets < 0)).all()
    assert (offsets[offsets >= 0] * dtype.itemsize % ALIGNMENT == 0).all()
    for name, module in modules.items():
        edit = lowered.edits.get(name, ModuleEdit())
        if edit.rank:
            assert packed.scale[module] == np.float32(edit.scale)
        found = [_read(pool, int(at), edit, i) for i, at in enumerate(offsets[module])]
        wanted = [edit.a, edit.b, edit.in_scale, edit.out_scale, edit.bias]
        for got, want in zip(found, wanted, strict=True):
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                torch.testing.assert_close(got, want.to(got.dtype).flatten(), rtol=0, atol=0)


def _read(pool: torch.Tensor, at: int, edit: ModuleEdit, column: int) -> torch.Tensor | None:
    if at < 0:
        return None
    tensor = [edit.a, edit.b, edit.in_scale, edit.out_scale, edit.bias][column]
    assert tensor is not None
    if column < 2:
        return pool[at : at + tensor.numel()]
    return pool[at : at + tensor.numel() * 4 // pool.element_size()].view(torch.float32)


def test_no_tensor_overlaps_another() -> None:
    modules = {"up": 0, "gate": 1, "norm": 2, "down": 3}
    packed = pack(LoweredAdapter(edits(1, torch.float32)), modules, reference, torch.bfloat16)
    sizes = [
        [3 * 5, 7 * 3, 0, 0, 0],
        [0] * 5,
        [0, 0, 0, 2 * 9, 2 * 9],
        [33, 5, 2 * 33, 0, 2 * 5],
    ]
    spans = sorted(
        (start, start + size)
        for starts, lengths in zip(packed.offsets.tolist(), sizes, strict=True)
        for start, size in zip(starts, lengths, strict=True)
        if start >= 0
    )
    ends = [end for _, end in spans]
    assert len(spans) == 8
    assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))
    assert ends[-1] <= packed.buffer.numel()


def test_an_adapter_that_edits_nothing() -> None:
    packed = pack(LoweredAdapter({}), {"up": 0}, reference, torch.float32)
    assert packed.bytes == 0
    assert packed.rank.tolist() == [0]
