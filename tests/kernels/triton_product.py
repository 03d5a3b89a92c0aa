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
PARTS = (("rank", (5, 0)), ("all", (33, 8)), ("out_scale", (0, 0)), ("bias", (0, 3)))
"""What each slot has beside its ranks on the two slices."""


class Setting:
    """Adapters on two slices, and rows that use them and the base.

    pools, tables: of the kernels, and the same numbers in float32 for the reference.
    """

    def __init__(self, dtype: torch.dtype, in_size: int, row_slots: list[int]) -> None:
        self._random = torch.Generator().manual_seed(in_size)
        self.pools = [torch.empty(0, dtype=dtype), torch.empty(0)]
        self.dtype = dtype
        out = sum(SIZES)
        self.x = self.normal(len(row_slots), in_size).to(dtype)
        self.weight = (self.normal(out, in_size) / in_size**0.5).to(dtype)
        self.bias = self.normal(out).to(dtype)
        self.group = SliceGroup((0, 1), (0, SIZES[0]), SIZES)
        self.plan = make_plan(np.array(row_slots, np.int32))
        self.tables = EditTable(len(PARTS), 2), EditTable(len(PARTS), 2)
        for slot, (what, ranks) in enumerate(PARTS):
            self._write(slot, what, ranks, in_size)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)

    def poison(self, slot: int) -> None:
        """Makes everything that the slot has NaN."""
        for offset in self.tables[0].offsets[slot].flatten().tolist():
            if offset >= 0:
                self.pools[0][offset : offset + 40] = torch.nan
        self.x[self.plan.row_slot == slot] = torch.nan

    def found(self) -> torch.Tensor:
        return kernels.linear_with_edits(
            self.x, self.weight, self.bias, self.group, self.pools[0], self.tables[0], self.plan
        )

    def wanted(self) -> torch.Tensor:
        """float32, from the same 16-bit numbers."""
        x, weight = self.x.float(), self.weight.float()
        y = torch.nn.functional.linear(x, weight, self.bias.float())
        reference.apply_edits_(y, x, self.group, self.pools[1], self.tables[1], self.plan)
        return y

    def _write(self, slot: int, what: str, ranks: tuple[int, ...], in_size: int) -> None:
        scale = self.normal(2).numpy()
        offsets = np.full((2, 2, 5), -1, np.int64)
        for module, (rank, size) in enumerate(zip(ranks, SIZES, strict=True)):
            if rank:
                a = (self.normal(rank, in_size) / in_size**0.5).to(self.dtype)
                b = (self.normal(size, rank) / rank**0.5).to(self.dtype)
                offsets[:, module, 0] = self._put(
                    kernels.pack_a(a, self.dtype), a.flatten().float()
                )
                offsets[:, module, 1] = self._put(
                    kernels.pack_b(b, self.dtype), b.flatten().float()
                )
            for column, name in ((3, "out_scale"), (4, "bias")):
                if what in (name, "all"):
                    vector = self.normal(size)
                    offsets[:, module, column] = self._put(vector.view(self.dtype), vector)
        for table, its_offsets in zip(self.tables, offsets, strict=True):
            table.write(slot, np.array(ranks, np.int32), scale, its_offsets)

    def _put(self, *flats: torch.Tensor) -> list[int]:
        """Into the kernels' pool and the reference's, with NaN behind; where in each."""
        starts = [len(pool) for pool in self.pools]
        for number, flat in enumerate(flats):
            gap = torch.full((32 + -len(flat) % 32,), torch.nan, dtype=flat.dtype)
            self.pools[number] = torch.cat([self.pools[number], flat, gap])
        return starts


def row_slots(rows: int) -> list[int]:
    return np.random.default_rng(rows).integers(-1, len(PARTS), rows).tolist()


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
        setting.pools[0],
        setting.tables[0],
        setting.plan,
    )
    assert torch.equal(unbiased, setting.found())


@pytest.mark.parametrize("rank", [0, 3])
def test_scaled_inputs(dtype: torch.dtype, rank: int) -> None:
    """The base's product takes scaled inputs, the low-rank part x as it is."""
    setting = Setting(dtype, 32, [0, -1])
    table, pool = setting.tables[0], setting.pools[0]
    factors, a, b = torch.linspace(-1, 2, 32), setting.normal(rank, 32), setting.normal(130, rank)
    a, b = a.to(dtype), b.to(dtype)
    offsets = np.full((2, 5), -1, np.int64)
    parts = (kernels.pack_a(a, dtype), kernels.pack_b(b, dtype), factors.view(dtype))
    for column, flat in enumerate(parts):
        offsets[0, column] = len(pool) if len(flat) else -1
        pool = torch.cat([pool, flat, flat.new_zeros(-len(flat) % 32)])
    table.write(0, np.array([rank, 0], np.int32), np.array([0.5, 0], np.float32), offsets)
    weight, group = setting.weight[: SIZES[0]], SliceGroup.single(0, SIZES[0])
    found = kernels.linear_with_edits(setting.x, weight, None, group, pool, table, setting.plan)
    x, low_rank = setting.x.float(), 0.5 * (b.float() @ a.float() @ setting.x[0].float())
    scaled = torch.stack([(x[0] * factors).to(dtype).float(), x[1]])
    wanted = scaled @ weight.float().T
    wanted[0] += low_rank
    unit = UNIT[dtype]
    torch.testing.assert_close(found.float(), wanted, rtol=unit, atol=16 * unit)


def test_misfits_are_refused() -> None:
    setting = Setting(torch.float32, 32, [0])
    setting.weight = setting.weight[:-1]
    with pytest.raises(ValueError, match="linear_with_edits: wanted"):
        setting.found()
