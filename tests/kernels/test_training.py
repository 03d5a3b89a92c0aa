"""add_low_rank_ and its backward of every backend against float64 arithmetic, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, drawn

from manylora.kernels import Backend, make_plan, make_stack, reference

RANKS = st.sampled_from((0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 64, 129, 255, 256)) | st.integers(1, 256)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass
class Case:
    """Stacked factors, the slot of every row, and the tensors of a forward and a backward."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    row_slots: list[int]
    x: torch.Tensor
    y: torch.Tensor
    dy: torch.Tensor
    dx: torch.Tensor
    a: torch.Tensor
    bt: torch.Tensor

    def own(self, slot: int) -> slice:
        start = sum(self.ranks[:slot])
        return slice(start, start + self.ranks[slot])

    def rows(self, slot: int) -> torch.Tensor:
        return torch.tensor(self.row_slots) == slot


def make_case(
    dtype: torch.dtype,
    factors: torch.dtype,
    sizes: tuple[int, int],
    ranks: tuple[int, ...],
    row_slots: list[int],
    seed: int,
) -> Case:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    (in_size, out), rows, total = sizes, len(row_slots), sum(ranks)
    return Case(
        ranks,
        tuple(normal(len(ranks)).tolist()),
        row_slots,
        x=normal(rows, in_size).to(dtype),
        y=normal(rows, out).to(dtype),
        dy=normal(rows, out).to(dtype),
        dx=normal(rows, in_size).to(dtype),
        a=(normal(total, in_size) / in_size**0.5).to(factors),
        bt=(normal(total, out) / out**0.5).to(factors),
    )


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    ranks = tuple(draw(st.lists(RANKS, max_size=4)))
    row_slots = draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=12))
    sizes = draw(st.integers(1, 200)), draw(st.integers(1, 150))
    factors = draw(st.sampled_from((dtype, torch.float32)))
    return make_case(dtype, factors, sizes, ranks, row_slots, draw(st.integers(0, 2**31)))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def inside_canary(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN, and a strided view in its middle that holds the tensor."""
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns + 40), torch.nan, dtype=tensor.dtype)
    view = buffer[1 : rows + 1, 19 : 19 + columns]
    view.copy_(tensor)
    return buffer, view


def poisoned(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN, and a contiguous view in its middle."""
    buffer = torch.full((like.numel() + 64,), torch.nan, dtype=like.dtype)
    return buffer, buffer[32 : 32 + like.numel()].view_as(like)


def forward(backend: Backend, case: Case) -> torch.Tensor:
    """The new y, after checking that nothing around it was written."""
    stack = make_stack(case.ranks, case.scales)
    plan = make_plan(np.array(case.row_slots, np.int32))
    buffer, y = inside_canary(case.y)
    _, x = inside_canary(case.x)
    backend.add_low_rank_(y, x, case.a, case.bt, stack, plan)
    result = y.clone()
    y.fill_(torch.nan)
    assert buffer.isnan().all(), "written beside y"
    return result


def backward(backend: Backend, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, added to what case.dx holds, da and dbt, from buffers that held NaN."""
    stack = make_stack(case.ranks, case.scales)
    plan = make_plan(np.array(case.row_slots, np.int32))
    buffer, dx = inside_canary(case.dx)
    (da_buffer, da), (dbt_buffer, dbt) = poisoned(case.a), poisoned(case.bt)
    _, x = inside_canary(case.x)
    _, dy = inside_canary(case.dy)
    backend.low_rank_backward_(dx, da, dbt, dy, x, case.a, case.bt, stack, plan)
    result = dx.clone(), da.clone(), dbt.clone()
    for around, view in ((buffer, dx), (da_buffer, da), (dbt_buffer, dbt)):
        view.fill_(torch.nan)
        assert around.isnan().all(), "written beside a result"
    return result


def assert_close(found: torch.Tensor, wanted: torch.Tensor, error: torch.Tensor, what: str) -> None:
    error = error + 1.01 * UNIT_ROUNDOFF[found.dtype] * (wanted.abs() + error) + 1e-7
    worst = ((found.double() - wanted).abs() / error).max() if found.numel() else 0.0
    assert worst <= 1, f"{what}: {worst:.2f} times the bound"


class Products:
    """One slot's float64 results, and the bounds on their errors.

    The bounds: h and g rounded once to bfloat16, float32 sums.
    """

    def __init__(self, case: Case, slot: int) -> None:
        own, self.rows = case.own(slot), case.rows(slot)
        self.scale = case.scales[slot]
        self.x, self.dy = case.x[self.rows].double(), case.dy[self.rows].double()
        self.a, self.bt = case.a[own].double(), case.bt[own].double()
        self.unit = 2.0**-8 if case.x.dtype == torch.bfloat16 else 0.0
        self.h, self.h_error = self._projected(self.x, self.a)
        self.g, self.g_error = self._projected(self.dy, self.bt)

    def _projected(
        self, rows: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = 2.0**-24 * (rows.shape[1] + 2) * (rows.abs() @ factor.abs().T)
        result = self.scale * (rows @ factor.T)
        return result, abs(self.scale) * sums + self.unit * result.abs()

    def added(
        self, before: torch.Tensor, hidden: torch.Tensor, error: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """before + hidden factor."""
        wanted = before.double() + hidden @ factor
        size = hidden.abs() @ factor.abs()
        return wanted, error @ factor.abs() + 2.0**-24 * (len(factor) + 2) * (size + wanted.abs())

    def summed(
        self, hidden: torch.Tensor, error: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hiddenᵀ rows."""
        size = hidden.abs().T @ rows.abs()
        return hidden.T @ rows, error.T @ rows.abs() + 2.0**-24 * (len(rows) + 2) * size


def assert_forward(case: Case, found: torch.Tensor) -> None:
    alone = torch.ones(len(case.row_slots), dtype=torch.bool)
    for slot, rank in enumerate(case.ranks):
        if rank:
            right = Products(case, slot)
            alone &= ~right.rows
            wanted, error = right.added(case.y[right.rows], right.h, right.h_error, right.bt)
            assert_close(found[right.rows], wanted, error, f"y of slot {slot}")
    assert torch.equal(bits(found[alone]), bits(case.y[alone]))


def assert_backward(case: Case, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    dx, da, dbt = found
    alone = torch.ones(len(case.row_slots), dtype=torch.bool)
    for slot, rank in enumerate(case.ranks):
        if rank:
            right, own = Products(case, slot), case.own(slot)
            alone &= ~right.rows
            wanted, error = right.added(case.dx[right.rows], right.g, right.g_error, right.a)
            assert_close(dx[right.rows], wanted, error, f"dx of slot {slot}")
            assert_close(da[own], *right.summed(right.g, right.g_error, right.x), f"dA {slot}")
            assert_close(dbt[own], *right.summed(right.h, right.h_error, right.dy), f"dB {slot}")
    assert torch.equal(bits(dx[alone]), bits(case.dx[alone]))


@drawn(interpreted=3)
@given(data=st.data())
def test_equals_float64(backend: Backend, dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    assert_forward(case, forward(backend, case))
    assert_backward(case, backward(backend, case))


MANY_ROWS = (
    # (in, out), ranks by slot, rows of each slot
    ((300, 520), (33,), (200,)),  # one adapter, several segments
    ((576, 192), (16, 8, 0, 64), (3, 150, 5, 0)),  # ranks mixed, one without rows
    ((129, 40), tuple(range(1, 33)), (1,) * 32),  # many adapters
    ((2100, 70), (6, 35), (2, 66)),  # a long sum
)


@pytest.mark.parametrize(("sizes", "ranks", "counts"), MANY_ROWS[1:2] if INTERPRETED else MANY_ROWS)
@pytest.mark.usefixtures("two_threads")
def test_many_rows(
    backend: Backend,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    ranks: tuple[int, ...],
    counts: tuple[int, ...],
) -> None:
    row_slots = [slot for slot, count in enumerate(counts) for _ in range(count)] + [-1, -1]
    np.random.default_rng(0).shuffle(row_slots)
    case = make_case(dtype, dtype, sizes, ranks, row_slots, seed=1)
    found = forward(backend, case), *backward(backend, case)
    assert_forward(case, found[0])
    assert_backward(case, found[1:])
    if INTERPRETED:  # which has one thread
        return
    torch.set_num_threads(1)
    again = forward(backend, case), *backward(backend, case)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(bits(one), bits(other)), "depends on the threads"


def test_what_an_adapter_gets_is_the_same_in_any_batch(
    backend: Backend, dtype: torch.dtype
) -> None:
    row_slots = [1, 0, -1, 1, 2, 0, 1, 2, 1] + [1] * 15
    case = make_case(dtype, dtype, (70, 90), (5, 17, 3), row_slots, seed=2)
    y, (dx, da, dbt) = forward(backend, case), backward(backend, case)
    mine, own = case.rows(1), case.own(1)
    alone = Case(
        case.ranks[1:2],
        case.scales[1:2],
        [0] * int(mine.sum()),
        **{name: getattr(case, name)[mine] for name in ("x", "y", "dy", "dx")},
        a=case.a[own],
        bt=case.bt[own],
    )
    found = forward(backend, alone), *backward(backend, alone)
    for one, other in zip(found, (y[mine], dx[mine], da[own], dbt[own]), strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_neighbour_stays_alone(
    backend: Backend, dtype: torch.dtype, poison: float
) -> None:
    row_slots = [0, 1, -1, 2, 1, 0, 2, 2]
    case = make_case(dtype, dtype, (45, 50), (5, 16, 1), row_slots, seed=3)
    y, (dx, da, dbt) = forward(backend, case), backward(backend, case)
    bad, own = case.rows(1), case.own(1)
    for tensor, part in (
        *((tensor, bad) for tensor in (case.x, case.y, case.dy, case.dx)),
        *((tensor, own) for tensor in (case.a, case.bt)),
    ):
        tensor[part] = poison
    found = forward(backend, case), *backward(backend, case)
    rank_ok = torch.ones(len(case.a), dtype=torch.bool)
    rank_ok[own] = False
    clean = ((y, ~bad), (dx, ~bad), (da, rank_ok), (dbt, rank_ok))
    for poisoned_one, (clean_one, good) in zip(found, clean, strict=True):
        assert torch.equal(bits(poisoned_one[good]), bits(clean_one[good]))
        assert not poisoned_one[~good].isfinite().any()


def test_a_batch_of_the_base_alone(backend: Backend, dtype: torch.dtype) -> None:
    case = make_case(dtype, dtype, (20, 30), (3, 2), [-1, -1], seed=4)
    assert torch.equal(bits(forward(backend, case)), bits(case.y))
    dx, da, dbt = backward(backend, case)
    assert torch.equal(bits(dx), bits(case.dx))
    assert not da.any()
    assert not dbt.any()


def test_against_autograd_in_float64() -> None:
    """The reference's formulas, which the bounds above follow."""
    case = make_case(torch.float32, torch.float32, (9, 7), (2, 0, 5), [0, 2, 2, -1, 1, 0], seed=5)
    names = ("x", "y", "dy", "dx", "a", "bt")
    wide = {name: getattr(case, name).double().requires_grad_(name in "xabt") for name in names}
    stack = make_stack(case.ranks, case.scales)
    plan = make_plan(np.array(case.row_slots, np.int32))
    rows = []
    for row, slot in enumerate(case.row_slots):
        y = wide["y"][row]
        if slot >= 0:
            own = case.own(slot)
            scale = float(stack.scale[slot])
            y = y + scale * wide["bt"][own].T @ (wide["a"][own] @ wide["x"][row])
        rows.append(y)
    wanted = torch.stack(rows)
    wanted.backward(wide["dy"].detach())
    with torch.no_grad():
        y = wide["y"].clone()
        reference.add_low_rank_(y, wide["x"], wide["a"], wide["bt"], stack, plan)
        torch.testing.assert_close(y, wanted)
        found = [torch.zeros_like(wide[name]) for name in ("x", "a", "bt")]
        dy, x, a, bt = (wide[name] for name in ("dy", "x", "a", "bt"))
        reference.low_rank_backward_(*found, dy, x, a, bt, stack, plan)
    for gradient, name in zip(found, ("x", "a", "bt"), strict=True):
        torch.testing.assert_close(gradient, wide[name].grad)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(3, 9)},
        {"x": torch.zeros(9, 2).T},
        {"dy": torch.zeros(2, 7)},
        {"dy": torch.zeros(2, 8, dtype=torch.bfloat16)},
        {"dx": torch.zeros(2, 8)},
        {"a": torch.zeros(4, 9)},
        {"bt": torch.zeros(8, 3).T},
        {"da": torch.zeros(3, 9, dtype=torch.bfloat16)},
        {"stack": make_stack((3,), (1.0,))},
        {"plan": make_plan(np.array([0, 2], np.int32))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_fit_is_refused(backend: Backend, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "dx": torch.zeros(2, 9),
        "da": torch.zeros(3, 9),
        "dbt": torch.zeros(3, 8),
        "dy": torch.zeros(2, 8),
        "x": torch.zeros(2, 9),
        "a": torch.zeros(3, 9),
        "bt": torch.zeros(3, 8),
        "stack": make_stack((1, 2), (1.0, 1.0)),
        "plan": make_plan(np.array([0, 1], np.int32)),
    }
    backend.low_rank_backward_(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low-rank: wanted"):
        backend.low_rank_backward_(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "scales"), [((1, -1), (1.0, 1.0)), ((1,), ()), ((1,), (float("nan"),))]
)
def test_a_stack_is_checked(ranks: tuple[int, ...], scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="stack: wanted"):
        make_stack(ranks, scales)
