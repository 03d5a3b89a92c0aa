"""apply_edits_ and scale_inputs of every backend against float64 arithmetic, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, drawn

from manylora.kernels import Backend, EditTable, Plan, PlanBuffer, SliceGroup, cpu, make_plan

RANKS = st.sampled_from((0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 64, 129, 255, 256)) | st.integers(1, 256)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass
class Edit:
    """One (slot, module) entry, already rounded to the dtype under test; absent parts are None."""

    scale: float
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    in_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass
class Case:
    """Edits per slot and module, and the slot of every row."""

    dtype: torch.dtype
    in_size: int
    sizes: tuple[int, ...]
    edits: list[list[Edit]]
    row_slots: list[int]
    x: torch.Tensor
    y: torch.Tensor

    def only(self, rows: list[int]) -> Case:
        slots = [self.row_slots[row] for row in rows]
        return Case(
            self.dtype, self.in_size, self.sizes, self.edits, slots, self.x[rows], self.y[rows]
        )


def make_case(
    dtype: torch.dtype,
    in_size: int,
    sizes: tuple[int, ...],
    parts: list[list[tuple[int, bool, bool]]],
    row_slots: list[int],
    seed: int,
) -> Case:
    """parts[slot][module] = (rank, has out_scale, has bias)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def edit(size: int, rank: int, out_scale: bool, bias: bool) -> Edit:
        found = Edit(scale=float(normal(1)))
        if rank:
            found.a = (normal(rank, in_size) / in_size**0.5).to(dtype)
            found.b = (normal(size, rank) / rank**0.5).to(dtype)
        found.out_scale = normal(size) if out_scale else None
        found.bias = normal(size) if bias else None
        return found

    edits = [[edit(size, *part) for size, part in zip(sizes, slot, strict=True)] for slot in parts]
    rows = len(row_slots)
    x, y = normal(rows, in_size).to(dtype), normal(rows, sum(sizes)).to(dtype)
    return Case(dtype, in_size, sizes, edits, row_slots, x, y)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    sizes = tuple(draw(st.lists(st.integers(1, 150), min_size=1, max_size=3)))
    part = st.tuples(RANKS, st.booleans(), st.booleans())
    slot = st.lists(part, min_size=len(sizes), max_size=len(sizes))
    parts = draw(st.lists(slot, max_size=4))
    row_slots = draw(st.lists(st.integers(-1, len(parts) - 1), min_size=1, max_size=12))
    return make_case(
        dtype, draw(st.integers(1, 200)), sizes, parts, row_slots, draw(st.integers(0, 2**31))
    )


class Arena:
    """A pool and table that hold the case's edits, with NaN between the tensors."""

    def __init__(self, backend: Backend, case: Case) -> None:
        self._parts = [torch.full((64,), torch.nan, dtype=case.dtype)]
        self._end = 64
        modules = len(case.sizes)
        self.table = EditTable(max(1, len(case.edits)), modules)
        for slot, edits in enumerate(case.edits):
            rank = np.zeros(modules, np.int32)
            scale = np.zeros(modules, np.float32)
            offsets = np.full((modules, 5), -1, np.int64)
            for module, edit in enumerate(edits):
                scale[module] = edit.scale
                if edit.a is not None and edit.b is not None:
                    rank[module] = len(edit.a)
                    offsets[module, :2] = (
                        self._put(backend.pack_a(edit.a, case.dtype)),
                        self._put(backend.pack_b(edit.b, case.dtype)),
                    )
                vectors = (edit.in_scale, edit.out_scale, edit.bias)
                for column, vector in enumerate(vectors, start=2):
                    if vector is not None:
                        offsets[module, column] = self._put(vector.float().view(case.dtype))
            self.table.write(slot, rank, scale, offsets)
        self.pool = torch.cat(self._parts)

    def _put(self, flat: torch.Tensor) -> int:
        start = self._end
        gap = torch.full((64 + -flat.numel() % 32,), torch.nan, dtype=flat.dtype)
        self._parts += [flat, gap]
        self._end += flat.numel() + gap.numel()
        return start


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def inside_canary(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN, and a strided view in its middle that holds the tensor."""
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns + 40), torch.nan, dtype=tensor.dtype)
    view = buffer[1 : rows + 1, 19 : 19 + columns]
    view.copy_(tensor)
    return buffer, view


def apply(
    backend: Backend, case: Case, arena: Arena | None = None, plan: Plan | None = None
) -> torch.Tensor:
    """The edited y, after checking that nothing around it was written."""
    arena = arena or Arena(backend, case)
    starts = tuple(int(start) for start in np.cumsum((0, *case.sizes[:-1])))
    group = SliceGroup(tuple(range(len(case.sizes))), starts, case.sizes)
    plan = plan or make_plan(np.array(case.row_slots, np.int32))
    buffer, y = inside_canary(case.y)
    _, x = inside_canary(case.x)
    backend.apply_edits_(y, x, group, arena.pool, arena.table, plan)
    result = y.clone()
    y.fill_(torch.nan)
    assert buffer.isnan().all(), "written beside y"
    return result


def assert_right(case: Case, found: torch.Tensor) -> None:
    """Each row against float64; what no edit touches, bit for bit.

    The bound: h rounded once to bfloat16, float32 sums, one rounding of the result.
    """
    unit = UNIT_ROUNDOFF[case.dtype]
    hidden_unit = unit if case.dtype == torch.bfloat16 else 0.0
    for row, slot in enumerate(case.row_slots):
        start = 0
        for module, size in enumerate(case.sizes):
            columns = slice(start, start + size)
            start += size
            before, after = case.y[row, columns], found[row, columns]
            edit = case.edits[slot][module] if slot >= 0 else Edit(0.0)
            if edit.a is None and edit.out_scale is None and edit.bias is None:
                assert torch.equal(bits(before), bits(after)), f"row {row}, module {module}"
                continue
            wanted = before.double()
            if edit.out_scale is not None:
                wanted = wanted * edit.out_scale
            error = 4 * 2.0**-24 * wanted.abs()
            if edit.a is not None and edit.b is not None:
                x, a, b = case.x[row].double(), edit.a.double(), edit.b.double()
                hidden = a @ x
                wanted = wanted + edit.scale * (b @ hidden)
                sums = 2.0**-24 * (case.in_size + len(a)) * (a.abs() @ x.abs())
                error += abs(edit.scale) * (b.abs() @ (hidden_unit * hidden.abs() + sums))
            if edit.bias is not None:
                wanted = wanted + edit.bias
                error += 2.0**-24 * edit.bias.abs()
            error += 1.01 * unit * (wanted.abs() + error) + 1e-7
            worst = ((after.double() - wanted).abs() / error).max()
            assert worst <= 1, f"row {row}, module {module}: {worst:.2f} times the bound"


@drawn(interpreted=4)
@given(data=st.data())
def test_equals_float64(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    assert_right(case, apply(backend, case))


MANY_ROWS = (
    # in, sizes, ranks by slot, rows of each slot
    (300, (520,), (33,), (200,)),  # one adapter, several segments
    (576, (576, 192, 192), (16, 8), (3, 70)),  # qkv with GQA; decode and prefill together
    (600, (1536, 1536), (64,), (1,)),  # one row, cut in pieces
    (129, (40,), tuple(range(1, 33)), (1,) * 32),  # many adapters
    (2100, (70,), (6, 35), (2, 66)),  # a long dot product
    (70, (48, 16, 16), (33, 0, 255), (300, 20, 1)),  # one adapter leaves all slices alone
    (33, (130, 130), (5, 64), (90, 280)),  # gate_up
)


@pytest.mark.parametrize(("in_size", "sizes", "ranks", "counts"), MANY_ROWS)
@pytest.mark.usefixtures("two_threads")
def test_many_rows(
    backend: Backend,
    dtype: torch.dtype,
    in_size: int,
    sizes: tuple[int, ...],
    ranks: tuple[int, ...],
    counts: tuple[int, ...],
) -> None:
    if INTERPRETED and dtype != torch.bfloat16 and in_size != 2100:
        pytest.skip("takes seconds in the interpreter")
    parts = [
        [(rank, slot % 2 == 1, slot % 3 == 1) for _ in sizes] for slot, rank in enumerate(ranks)
    ]
    row_slots = [slot for slot, count in enumerate(counts) for _ in range(count)] + [-1, -1]
    np.random.default_rng(0).shuffle(row_slots)
    case = make_case(dtype, in_size, sizes, parts, row_slots, seed=1)
    found = apply(backend, case)
    assert_right(case, found)
    if INTERPRETED:  # which has one thread
        return
    torch.set_num_threads(1)
    assert torch.equal(bits(found), bits(apply(backend, case))), "depends on the threads"


@drawn(interpreted=4)
@given(data=st.data())
def test_a_row_is_the_same_in_any_batch(
    backend: Backend, dtype: torch.dtype, data: st.DataObject
) -> None:
    case = data.draw(cases(dtype))
    together = apply(backend, case)
    order = data.draw(st.permutations(range(len(case.row_slots))))
    some = order[: data.draw(st.integers(1, len(order)))]
    assert torch.equal(bits(apply(backend, case.only(some))), bits(together[some]))
    alone = case.only(order[-1:])
    assert torch.equal(bits(apply(backend, alone)), bits(together[order[-1:]]))


@pytest.mark.parametrize(
    ("rows", "rank"),
    [(2, 37), (65, 37), (20, 16)]
    if INTERPRETED
    else [*((n, 37) for n in (1, 2, 3, 4, 5, 7, 9, 65, 130)), (33, 5), (20, 16), (130, 32)],
)
def test_a_row_is_the_same_in_a_batch_of_its_own_adapter(
    backend: Backend, dtype: torch.dtype, rows: int, rank: int
) -> None:
    case = make_case(dtype, 545, (200,), [[(rank, False, rank > 16)]], [0] * rows, seed=2)
    together = apply(backend, case)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(bits(apply(backend, case.only([row]))), bits(together[[row]]))


def test_a_plan_at_a_fixed_address(kernels: Backend, dtype: torch.dtype) -> None:
    parts = [[(rank, True, False)] * 2 for rank in (5, 16, 1)]
    buffer = PlanBuffer(rows=6, slots=3)
    for row_slots in ([0, 1, -1, 2, 1, 0], [1] * 6, [-1] * 6, [2, -1, -1, -1, -1, 0]):
        case = make_case(dtype, 45, (50, 33), parts, row_slots, seed=3)
        buffer.fill(np.array(row_slots, np.int32))
        found = apply(kernels, case, plan=buffer.plan)
        assert torch.equal(bits(found), bits(apply(kernels, case)))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_neighbour_stays_alone(
    backend: Backend, dtype: torch.dtype, poison: float
) -> None:
    parts = [[(rank, True, True)] * 2 for rank in (5, 16, 1)]
    row_slots = [0, 1, -1, 2, 1, 0, 2, 2]
    case = make_case(dtype, 45, (50, 33), parts, row_slots, seed=3)
    clean = apply(backend, case)
    bad = torch.tensor(row_slots) == 1
    for edit in case.edits[1]:
        for tensor in (edit.a, edit.b, edit.out_scale, edit.bias):
            assert tensor is not None
            tensor.fill_(poison)
    case.x[bad] = poison
    case.y[bad] = poison
    found = apply(backend, case)
    assert not found[bad].isfinite().any()
    assert torch.equal(bits(found[~bad]), bits(clean[~bad]))


@drawn(interpreted=8)
@given(data=st.data())
def test_a_whole_module(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    """out_scale ∘ (W (in_scale ∘ x)) + scale · B (A x) + bias, its parts alone and together: the
    base's product takes what scale_inputs gives, the low-rank part x as it is."""
    part = st.tuples(RANKS | st.just(0), st.booleans(), st.booleans(), st.booleans())
    parts = data.draw(st.lists(part, max_size=3))
    row_slots = data.draw(st.lists(st.integers(-1, len(parts) - 1), min_size=1, max_size=9))
    in_size, size = data.draw(st.integers(1, 70) | st.just(1100)), data.draw(st.integers(1, 90))
    seed = data.draw(st.integers(0, 2**31))
    case = make_case(dtype, in_size, (size,), [[part[:3]] for part in parts], row_slots, seed)
    factors = torch.linspace(-2, 3, in_size)
    is_scaled = [part[3] for part in parts]
    for [edit], scales in zip(case.edits, is_scaled, strict=True):
        edit.in_scale = factors if scales else None
    arena, plan = Arena(backend, case), make_plan(np.array(row_slots, np.int32))
    _, x = inside_canary(case.x)
    found = backend.scale_inputs(x, SliceGroup.single(0, size), arena.pool, arena.table, plan)
    wanted = case.x.clone()
    for row, slot in enumerate(row_slots):
        if slot >= 0 and is_scaled[slot]:
            wanted[row] = (case.x[row].float() * factors).to(dtype)
    assert torch.equal(bits(found), bits(wanted))
    assert torch.equal(bits(x), bits(case.x)), "x itself was changed"
    if not any(slot >= 0 and is_scaled[slot] for slot in row_slots):
        assert found is x
    weight = torch.randn(size, in_size, generator=torch.Generator().manual_seed(seed))
    case.y = (found.float() @ weight.T / in_size**0.5).to(dtype)
    assert_right(case, apply(backend, case, arena))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_in_scale_stays_alone(
    backend: Backend, dtype: torch.dtype, poison: float
) -> None:
    case = make_case(dtype, 45, (8,), [[(0, False, False)]] * 2, [0, 1, -1, 0, 1], seed=3)
    case.edits[0][0].in_scale = torch.full((45,), poison)
    case.edits[1][0].in_scale = torch.full((45,), 2.0)
    arena, plan = Arena(backend, case), make_plan(np.array(case.row_slots, np.int32))
    found = backend.scale_inputs(case.x, SliceGroup.single(0, 8), arena.pool, arena.table, plan)
    assert not found[[0, 3]].isfinite().any()
    assert torch.equal(
        bits(found[[1, 2, 4]]), bits(case.x[[1, 2, 4]] * torch.tensor([[2], [1], [2]]).to(dtype))
    )


def test_scale_inputs_refuses_modules_that_share_an_input(backend: Backend) -> None:
    case = make_case(torch.float32, 9, (4, 4), [[(1, False, False)] * 2], [0], seed=4)
    case.edits[0][1].in_scale = torch.ones(9)
    arena = Arena(backend, case)
    group = SliceGroup((0, 1), (0, 4), (4, 4))
    plan = make_plan(np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="in_scale among the modules"):
        backend.scale_inputs(case.x, group, arena.pool, arena.table, plan)


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(3, 9)},
        {"y": torch.zeros(2, 7)},
        {"y": torch.zeros(2, 8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9, 2).T},
        {"pool": torch.zeros(300, dtype=torch.float16)},
        {"group": SliceGroup.single(1, 8)},
        {"plan": make_plan(np.array([0, 1], np.int32))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_fit_is_refused(change: dict[str, object]) -> None:
    case = make_case(torch.float32, 9, (8,), [[(2, False, False)]], [0, 0], seed=5)
    arena = Arena(cpu, case)
    arguments: dict[str, object] = {
        "y": case.y,
        "x": case.x,
        "group": SliceGroup.single(0, 8),
        "pool": arena.pool,
        "table": arena.table,
        "plan": make_plan(np.zeros(2, np.int32)),
    }
    cpu.apply_edits_(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wanted x"):
        cpu.apply_edits_(**(arguments | change))  # type: ignore[arg-type]


def test_many_in_one_buffer(backend: Backend, dtype: torch.dtype) -> None:
    factors = [
        (torch.randn(rank, 33).to(source), torch.randn(70, rank).to(source))
        for rank, source in ((5, torch.float32), (16, torch.bfloat16), (1, torch.float16))
    ]
    buffer, starts = backend.pack_factors(factors, dtype, 100)
    assert starts.shape == (3, 2) and starts.min() >= 100
    assert (starts % (64 // dtype.itemsize) == 0).all()
    ends = [0]
    for begins, (a, b) in zip(starts, factors, strict=True):
        for begin, packed in zip(
            begins, (backend.pack_a(a, dtype), backend.pack_b(b, dtype)), strict=True
        ):
            assert begin >= ends[-1]
            ends.append(begin + len(packed))
            assert torch.equal(bits(buffer[begin : ends[-1]]), bits(packed))
    assert len(buffer) >= ends[-1]


def test_no_factors_leave_only_what_comes_before(backend: Backend, dtype: torch.dtype) -> None:
    buffer, starts = backend.pack_factors([], dtype, 100)
    assert starts.shape == (0, 2) and len(buffer) >= 100
