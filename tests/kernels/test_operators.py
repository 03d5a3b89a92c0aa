"""The custom operators: torch's own checks of them, tracing, gradients, and training with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from manylora.kernels import (
    Backend,
    EditTable,
    Plan,
    RankStack,
    SliceGroup,
    make_batch,
    make_plan,
    make_stack,
    operators,
    reference,
    stack_factors,
)

OPS = torch.ops.manylora
ROW_SLOTS = np.array([0, 2, -1, 2, 1, 0, 2], np.int32)
STACK = make_stack((2, 0, 3), (0.5, 1.0, -2.0))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def trainable(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """y, x, a, bt that want gradients."""
    shapes = (len(ROW_SLOTS), 5), (len(ROW_SLOTS), 6), (STACK.ranks, 6), (STACK.ranks, 5)
    made = (normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    return tuple(tensor.requires_grad_() for tensor in made)


def edits() -> tuple[SliceGroup, torch.Tensor, EditTable, Plan]:
    """One module of 8 outputs and 6 inputs, with an edit of rank 2 in slot 0, in the reference."""
    table = EditTable(3, 1)
    offsets = np.array([[0, 12, -1, -1, -1]], np.int64)
    table.write(0, np.array([2], np.int32), np.array([0.5], np.float32), offsets)
    return SliceGroup.single(0, 8), normal(28), table, make_plan(ROW_SLOTS)


def attention_batch() -> dict[str, torch.Tensor]:
    counts, context = np.array([1, 3], np.int32), np.array([5, 3], np.int32)
    table = np.array([[2, 0], [1, 3]], np.int32)
    batch = make_batch(counts, context, table, block_size=16)
    names = ("seq_starts", "context", "block_table", "slot_mapping")
    return {name: getattr(batch, name) for name in names}


def apply_edits_arguments() -> tuple[object, ...]:
    group, pool, table, plan = edits()
    tensors = (pool, table.rank, table.scale, table.offsets, plan.words)
    slices = (list(group.modules), list(group.starts), list(group.sizes))
    numbers = (2, plan.edited, plan.segments, plan.max_slot)
    return normal(7, 8), normal(7, 6), *tensors, *slices, *numbers, "reference"


def add_low_rank_arguments() -> tuple[object, ...]:
    plan = make_plan(ROW_SLOTS)
    numbers = (STACK.max_rank, plan.edited, plan.segments, plan.max_slot)
    fixed = (STACK.starts, STACK.scale, plan.words, *numbers)
    return *trainable(torch.float32), *fixed, ""


def backward_arguments() -> tuple[object, ...]:
    return tuple(
        argument.detach() if isinstance(argument, torch.Tensor) else argument
        for argument in add_low_rank_arguments()
    )


def attention_arguments(q_only: bool) -> tuple[object, ...]:
    caches = normal(4, 2, 16, 8), normal(4, 2, 16, 8, seed=1)
    batch = attention_batch().values()
    if q_only:
        how = (0.3, 2, 5.0, normal(4), None, None, None, "")
        return normal(4, 4, 8), *caches, *batch, *how
    return normal(4, 2, 8), normal(4, 2, 8, seed=1), *caches, *batch, ""


def rotary_arguments() -> tuple[object, ...]:
    caches = normal(4, 2, 16, 8), normal(4, 2, 16, 8, seed=1)
    return normal(4, 64), normal(4, 3), normal(4, 3), *caches, *attention_batch().values(), ""


ARGUMENTS: dict[str, Callable[[], tuple[object, ...]]] = {
    "apply_edits_": apply_edits_arguments,
    "add_low_rank": add_low_rank_arguments,
    "low_rank_backward": backward_arguments,
    "rms_norm": lambda: (normal(3, 8), normal(8), 1e-5, normal(3, 8), 1.0, ""),
    "layer_norm": lambda: (normal(3, 8), normal(8), normal(8), 1e-5, None, ""),
    "silu_mul": lambda: (normal(3, 8), ""),
    "gelu_mul": lambda: (normal(3, 8), "tanh", ""),
    "paged_attention": lambda: attention_arguments(q_only=True),
    "write_kv": lambda: attention_arguments(q_only=False),
    "rotary_write_kv": rotary_arguments,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, ARGUMENTS[name]())


def test_every_operator_is_checked() -> None:
    found = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("manylora::")
    }
    assert found == set(ARGUMENTS)


def test_gradcheck() -> None:
    plan = make_plan(ROW_SLOTS)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return operators.add_low_rank(*tensors, STACK, plan, backend="reference")  # type: ignore[misc]

    assert torch.autograd.gradcheck(function, trainable(torch.float64))


def test_a_serving_step_is_traced_whole(backend: Backend) -> None:
    group, pool, table, plan = edits()
    pool = torch.cat([pool[:12], backend.pack_b(pool[12:].view(8, 2), torch.float32)])
    x, weight, batch = (
        normal(7, 6),
        normal(6),
        make_batch(np.array([7], np.int32), np.array([7], np.int32), np.array([[0]], np.int32), 16),
    )

    def step(x: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
        k_cache, v_cache, y = torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 16, 4), torch.ones(7, 8)
        normed, _ = operators.rms_norm(x, weight, 1e-5, backend=name)
        operators.apply_edits_(y, normed, group, pool, table, plan, name)
        k = y.view(7, 2, 4)[:, :1]
        operators.write_kv(k, k + 1, k_cache, v_cache, batch, name)
        out = operators.paged_attention(
            y.view(7, 2, 4), k_cache, v_cache, batch, scale=0.5, backend=name
        )
        return operators.silu_mul(out.flatten(1), name), y

    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(traced(x, backend.NAME), step(x, backend.NAME), strict=True):
        assert torch.equal(found, wanted)
    y = torch.ones(7, 8)
    backend.apply_edits_(y, reference.rms_norm(x, weight, 1e-5)[0], group, pool, table, plan)
    torch.testing.assert_close(traced(x, backend.NAME)[1], y)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_operator_is_traced(name: str) -> None:
    """Compiled with fakes first, then run: what it returns and what it writes are as without."""

    def call(*arguments: object) -> tuple[torch.Tensor, ...]:
        result = getattr(OPS, name)(*arguments)
        return result if isinstance(result, tuple) else (result,)

    plain, traced = ARGUMENTS[name](), ARGUMENTS[name]()
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in ((call(*plain), compiled(*traced)), (plain, traced)):
        for wanted, found in zip(one, other, strict=True):
            if isinstance(wanted, torch.Tensor):
                assert torch.equal(wanted, found)
            else:
                assert wanted == found


def test_training_is_traced_whole() -> None:
    plan = make_plan(ROW_SLOTS)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return operators.add_low_rank(*tensors, STACK, plan).square().sum()  # type: ignore[misc]

    eager, traced = trainable(torch.float32), trainable(torch.float32)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*traced).backward()
    for one, other in zip(eager, traced, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_second_derivative_is_refused() -> None:
    tensors = trainable(torch.float32)
    result = operators.add_low_rank(*tensors, STACK, make_plan(ROW_SLOTS))  # type: ignore[misc]
    (gradient,) = torch.autograd.grad(result.square().sum(), tensors[2], create_graph=True)
    with pytest.raises(RuntimeError, match="low_rank_backward"):
        gradient.sum().backward()


SIZES = (24, 33, 10)  # of the layers' inputs and outputs
ADAPTERS = ((1, 2.0), (5, 5.0), (8, 4.0))  # rank, alpha
COUNTS = (3, 70, 9)  # rows


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*SIZES[:2]), nn.Tanh(), nn.Linear(*SIZES[1:]))


def loss_of(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found - wanted).square().mean()


def factors_of(model: nn.Module, layer: int) -> tuple[nn.Parameter, nn.Parameter]:
    module = model.get_submodule(f"base_model.model.{layer}")
    return module.lora_A["default"].weight, module.lora_B["default"].weight  # type: ignore[union-attr, index]


class Batched(nn.Module):
    """The network with every adapter at once, each on the rows that the plan gives it."""

    def __init__(self, models: list[nn.Module], stack: RankStack, plan: Plan, name: str) -> None:
        super().__init__()
        self.net, self.stack, self.plan, self.name = network(), stack, plan, name
        layers = [stack_factors([factors_of(model, layer) for model in models]) for layer in (0, 2)]
        self.factors = nn.ParameterList(part.detach().clone() for both in layers for part in both)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, bt, a2, bt2 = self.factors
        first, activation, second = self.net
        h = activation(self.edited(first(x), x, a, bt))
        return self.edited(second(h), h, a2, bt2)

    def edited(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, bt: torch.Tensor
    ) -> torch.Tensor:
        return operators.add_low_rank(y, x, a, bt, self.stack, self.plan, self.name)


def test_three_adapters_train_in_one_batch_as_each_alone(backend: Backend) -> None:
    """Gradients of every step, and what three steps make of the adapters, equal peft's."""
    alone = []
    for seed, (rank, alpha) in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights=False
        )
        alone.append(get_peft_model(network(), config))
    row_slots = np.repeat(np.arange(3, dtype=np.int32), COUNTS)
    np.random.default_rng(0).shuffle(row_slots)
    x, wanted = normal(len(row_slots), SIZES[0]), normal(len(row_slots), SIZES[2], seed=1)
    mine = [torch.from_numpy(row_slots == slot) for slot in range(3)]
    stack = make_stack([rank for rank, _ in ADAPTERS], [alpha / rank for rank, alpha in ADAPTERS])
    batched = Batched(alone, stack, make_plan(row_slots), backend.NAME)
    optimizers = [
        torch.optim.SGD(parameters, lr=0.1)
        for parameters in (*(model.parameters() for model in alone), batched.factors)
    ]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        found = batched(x)
        torch.stack([loss_of(found[rows], wanted[rows]) for rows in mine]).sum().backward()
        for model, rows in zip(alone, mine, strict=True):
            loss_of(model(x[rows]), wanted[rows]).backward()
        for layer, (a, bt) in ((0, batched.factors[:2]), (2, batched.factors[2:])):
            pairs = [factors_of(model, layer) for model in alone]
            wanted_a, wanted_bt = stack_factors((a.grad, b.grad) for a, b in pairs)
            torch.testing.assert_close(a.grad, wanted_a, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(bt.grad, wanted_bt, rtol=1e-5, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    for layer, start in ((0, 0), (2, 2)):
        wanted_factors = stack_factors(factors_of(model, layer) for model in alone)
        for factor, same in zip(batched.factors[start : start + 2], wanted_factors, strict=True):
            torch.testing.assert_close(factor, same, rtol=1e-5, atol=1e-5)
