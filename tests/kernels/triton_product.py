"""linear_with_edits in Triton's interpreter: as apply_edits_ after a product that is not rounded.

Not collected by itself: test_triton.py runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import manylora.kernels.triton as kernels
from manylora.kernels import EditTable, SliceGroup, make_plan, reference

UNIT = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SIZES = (130, 40)
SLOT_RANKS = ((5, 0), (33, 8), (0, 3))


class Setting:
    """Three adapters on two slices, one with everything, and rows that use them and the base."""

    def __init__(self, dtype: torch.dtype, in_size: int, row_slots: list[int]) -> None:
        self._random = torch.Generator().manual_seed(in_size)
        self._parts: list[torch.Tensor] = []
        self.dtype = dtype
        out = sum(SIZES)
        self.x = self.normal(len(row_slots), in_size).to(dtype)
        self.weight = (self.normal(out, in_size) / in_size**0.5).to(dtype)
        self.bias = self.normal(out).to(dtype)
        self.group = SliceGroup((0, 1), (0, SIZES[0]), SIZES)
        self.plan = make_plan(np.array(row_slots, np.int32))
        self.tables = EditTable(3, 2), EditTable(3, 2)  # of the kernels, of the reference
        for slot, ranks in enumerate(SLOT_RANKS):
            self._write(slot, ranks, in_size)
        self.pool = torch.cat(self._parts)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)

    def poison(self, slot: int) -> None:
        """Makes everything that the slot has NaN."""
        for offset in self.tables[0].offsets[slot].flatten().tolist():
            if offset >= 0:
                self.pool[offset : offset + 40] = torch.nan
        self.x[self.plan.row_slot == slot] = torch.nan

    def found(self) -> torch.Tensor:
        return kernels.linear_with_edits(
            self.x, self.weight, self.bias, self.group, self.pool, self.tables[0], self.plan
        )

    def wanted(self) -> torch.Tensor:
        """float32, from the same 16-bit numbers."""
        y = torch.nn.functional.linear(self.x.float(), self.weight.float(), self.bias.float())
        pool = self.pool.float() if self.dtype != torch.float32 else self.pool
        rounded = y if self.dtype == torch.float32 else y.clone()
        reference.apply_edits_(rounded, self.x.float(), self.group, pool, self.tables[1], self.plan)
        return rounded

    def _write(self, slot: int, ranks: tuple[int, ...], in_size: int) -> None:
        scale = self.normal(2).numpy()
        offsets = np.full((2, 2, 5), -1, np.int64)
        for module, (rank, size) in enumerate(zip(ranks, SIZES, strict=True)):
            if rank:
                a = self.normal(rank, in_size).to(self.dtype) / in_size**0.5
                b = self.normal(size, rank).to(self.dtype) / rank**0.5
                offsets[:, module, 0] = self._put(a.flatten())
                offsets[0, module, 1] = self._put(kernels.pack_b(b, self.dtype))
                offsets[1, module, 1] = self._put(b.flatten())
            if slot == 1 and self.dtype == torch.float32:
                for column in (3, 4):
                    offsets[:, module, column] = self._put(self.normal(size))
        for table, its_offsets in zip(self.tables, offsets, strict=True):
            table.write(slot, np.array(ranks, np.int32), scale, its_offsets)

    def _put(self, flat: torch.Tensor) -> int:
        start = sum(map(len, self._parts))
        self._parts.append(torch.cat([flat, flat.new_zeros(-len(flat) % 32)]))
        return start


def row_slots(rows: int) -> list[int]:
    return np.random.default_rng(rows).integers(-1, 3, rows).tolist()


@pytest.mark.parametrize(("rows", "in_size"), [(1, 33), (70, 100), (140, 300)])
def test_against_the_reference(dtype: torch.dtype, rows: int, in_size: int) -> None:
    setting = Setting(dtype, in_size, row_slots(rows))
    found, wanted = setting.found(), setting.wanted()
    assert found.dtype == dtype
    order = in_size * 2**-24  # float32 sums of as many terms, in another order
    atol = max(4 * UNIT[dtype], order)
    torch.testing.assert_close(found.float(), wanted, rtol=UNIT[dtype], atol=atol)


def test_a_poisoned_neighbour_stays_alone() -> None:
    setting = Setting(torch.float32, 60, row_slots(50))
    clean = setting.found()
    setting.poison(1)
    found = setting.found()
    bad = setting.plan.row_slot == 1
    assert not found[bad].isfinite().any()
    assert torch.equal(found[~bad], clean[~bad])


def test_without_adapters_and_without_bias() -> None:
    setting = Setting(torch.float32, 60, [-1] * 5)
    setting.bias.zero_()
    want = setting.x @ setting.weight.T
    torch.testing.assert_close(setting.found(), want)
    unbiased = kernels.linear_with_edits(
        setting.x,
        setting.weight,
        None,
        setting.group,
        setting.pool,
        setting.tables[0],
        setting.plan,
    )
    assert torch.equal(unbiased, setting.found())


def test_scaled_inputs() -> None:
    setting = Setting(torch.float32, 32, [0, -1])
    table, group = setting.tables[0], SliceGroup.single(0, SIZES[0])
    factors = torch.linspace(-1, 2, 32)
    setting.pool = torch.cat([setting.pool, factors])
    offsets = table.offsets[0].numpy().copy()
    offsets[0, 2] = len(setting.pool) - 32
    table.write(0, np.zeros(2, np.int32), np.zeros(2, np.float32), offsets)
    weight = setting.weight[: SIZES[0]]
    found = kernels.linear_with_edits(
        setting.x, weight, None, group, setting.pool, table, setting.plan
    )
    wanted = torch.stack([setting.x[0] * factors, setting.x[1]]) @ weight.T
    torch.testing.assert_close(found, wanted)


def test_misfits_are_refused() -> None:
    setting = Setting(torch.float32, 32, [0])
    setting.weight = setting.weight[:-1]
    with pytest.raises(ValueError, match="linear_with_edits: wanted"):
        setting.found()
