"""Several adapters in one request, beside single ones and the base."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing.classifiers import make_task_adapter, task_model, tiny_encoder
from manylora_testing.engine import Answer, House
from manylora_testing.methods import make_method, peft_rows
from manylora_testing.tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from manylora.errors import FailedPrecondition, NotFound
from manylora.server.engine.types import (
    AdapterKey,
    PooledTask,
    ResidencyState,
    Rows,
    WeightedPart,
)
from manylora.server.rpc.resolve import composition_key

pytestmark = pytest.mark.filterwarnings("ignore")

Start = Callable[..., Awaitable[House]]
PROMPT = [9, 8, 7, 70, 71, 72, 73, 74, 75]
OTHERS = ("loha", "lokr-both", "adalora-bias", "lora_bias", "hra", "lora-embedding-head", "dora")


def key(**weights: float) -> AdapterKey:
    """By digests with "_" for "-"."""
    parts = [(name.replace("_", "-"), weight) for name, weight in weights.items()]
    return composition_key(tuple(WeightedPart(d, f"tenant/{d}@1", w) for d, w in parts))


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    auto = AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def others(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    return {name: make_method(name, "llama", model, root / name) for name in OTHERS}


def concatenated(model: Any, adapters: Mapping[str, Path], weights: Mapping[str, float]) -> Any:
    """peft's own combination of LoRA adapters."""
    made: Any = copy.deepcopy(model)
    for name in weights:
        if isinstance(made, peft.PeftModel):
            made.load_adapter(adapters[name], name)
        else:
            made = peft.PeftModel.from_pretrained(made, adapters[name], adapter_name=name)
    names, values = list(weights), list(weights.values())
    made.add_weighted_adapter(names, values, "sum", combination_type="cat")
    made.set_adapter("sum")
    return made


@torch.no_grad()
def summed(model: Any, adapters: Mapping[str, Path], weights: Mapping[str, float]) -> Any:
    """The base, and to each of its parameters the weighted sum of what merging each adapter
    changes in it."""
    total = with_biases(model)
    before, sums = dict(with_biases(model).named_parameters()), dict(total.named_parameters())
    for name, weight in weights.items():
        merged = peft.PeftModel.from_pretrained(with_biases(model), adapters[name])
        for place, own in merged.merge_and_unload().named_parameters():
            sums[place] += weight * (own - before[place])
    return total


def with_biases(model: Any) -> Any:
    """A copy, with biases of zeros where there are none: peft merges none into nothing."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if type(module) is torch.nn.Linear and module.bias is None:
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    return made


@torch.no_grad()
def check(oracle: Any, answer: Answer, prompt: list[int] = PROMPT) -> None:
    """Tokens are its likeliest, log-probabilities its own within 1e-4."""
    rows = oracle(torch.tensor([[*prompt, *answer.tokens]]), use_cache=False).logits[0].float()
    rows = rows[len(prompt) - 1 : -1]
    assert answer.tokens == rows.argmax(dim=-1).tolist()
    for row, found in zip(rows.log_softmax(dim=-1), answer.logprobs, strict=True):
        for entry in found.top:
            assert abs(float(row[entry.token_id]) - entry.logprob) < 1e-4


async def ask(house: House, adapter: str | AdapterKey, prompt: list[int] = PROMPT) -> Answer:
    return await house.ask(prompt, adapter, max_tokens=6, ignore_eos=True, logprobs=20)


async def test_mixed_batch_is_pefts(
    start: Start, model: Any, others: dict[str, Path], adapters: dict[str, Path]
) -> None:
    house = await start(max_batch_tokens=16)
    house.fetch.directories |= others
    loras = [
        {"adapter-0": 0.7, "adapter-1": 0.3},
        {"adapter-1": -0.5, "adapter-2": 1.25, "adapter-3": 0.1},
        {"adapter-5": 1.0, "adapter-6": 1.0},
    ]
    mixed = [
        {"loha": 0.5, "adapter-1": 0.5, "lokr-both": -0.25},
        {"adalora-bias": 0.8, "lora_bias": 0.6},
        {"hra": 0.4, "lora-embedding-head": 1.5, "adapter-3": 0.7},
        {"lora_bias": 0.5},
    ]
    right: dict[str, Any] = {}
    keys: list[str | AdapterKey] = ["", "adapter-1", "dora", "adapter-2"]
    for weights in (*loras, *mixed):
        parts = tuple(WeightedPart(d, f"tenant/{d}@1", w) for d, w in weights.items())
        keys.append(composition_key(parts))
        oracle = concatenated if weights in loras else summed
        right[keys[-1].digest] = oracle(model, {**adapters, **others}, weights)
    answers = await asyncio.gather(*(ask(house, adapter) for adapter in keys))
    for adapter, answer in zip(keys, answers, strict=True):
        if isinstance(adapter, AdapterKey):
            check(right[adapter.digest], answer)
        else:
            directory = {**adapters, **others}.get(adapter)
            rows = peft_rows(model, directory, [*PROMPT, *answer.tokens])[len(PROMPT) - 1 : -1]
            assert answer.tokens == rows.argmax(dim=-1).tolist()
    assert len({tuple(answer.tokens) for answer in answers}) > len(keys) // 2
    await house.check_nothing_is_held()


async def test_the_cache_of_one_is_not_anothers(start: Start, model: Any, adapters: Any) -> None:
    house = await start()
    prompt = PROMPT * 2
    first = key(adapter_0=0.7, adapter_1=0.3)
    for adapter in (first, key(adapter_0=0.3, adapter_1=0.7), key(adapter_0=0.7), "adapter-0", ""):
        for cached in (0, 16):
            answer = await ask(house, adapter, prompt)
            assert answer.usage is not None and answer.usage.cached_tokens == cached
    swapped = await ask(house, key(adapter_1=0.3, adapter_0=0.7), prompt)
    assert swapped.usage is not None and swapped.usage.cached_tokens == 16
    check(concatenated(model, adapters, {"adapter-0": 0.7, "adapter-1": 0.3}), swapped, prompt)
    assert house.fetch.fetched.count("adapter-1") == 2  # of two compositions, swapped or not
    await house.check_nothing_is_held()


async def test_unloading_a_part_unloads_its_compositions(start: Start) -> None:
    house = await start()
    both, other = key(adapter_0=0.5, adapter_1=0.5), key(adapter_2=0.5, adapter_3=0.5)
    await asyncio.gather(*(ask(house, adapter) for adapter in (both, other, "adapter-0")))
    request = house.request(PROMPT, both, max_tokens=100, ignore_eos=True)
    stream = house.engine.stream(request)
    await anext(stream)
    with pytest.raises(FailedPrecondition, match="in use"):
        await house.unload("adapter-0")
    assert set(await house.resident()) == {both.digest, other.digest, "adapter-0"}
    await stream.aclose()
    await house.settled()
    await house.unload("adapter-1")  # resident as a part alone
    assert set(await house.resident()) == {other.digest, "adapter-0"}
    gone = house.seen.residencies[-1]
    assert (gone.key, gone.state) == (both, ResidencyState.EVICTED)
    with pytest.raises(NotFound):
        await house.unload("adapter-1")
    await house.check_nothing_is_held()


async def test_one_that_cannot_be_is_its_own_requests_affair(
    start: Start, others: dict[str, Path]
) -> None:
    house = await start()
    house.fetch.directories |= others
    house.fetch.errors["adapter-4"] = NotFound("no such object", field="digest")
    results = await asyncio.gather(
        ask(house, key(adapter_0=0.5, dora=0.5)),
        ask(house, key(adapter_0=0.5, adapter_4=0.5)),
        ask(house, key(dora=0.5)),
        ask(house, "dora"),
        ask(house, key(adapter_0=0.5, adapter_1=0.5)),
        return_exceptions=True,
    )
    for refused in (results[0], results[2]):
        assert isinstance(refused, FailedPrecondition)
        assert refused.field == "adapter: tenant/dora@1"
        assert refused.found is not None and refused.found.startswith("scaled outputs in model.")
    assert isinstance(results[1], NotFound)
    assert isinstance(results[3], Answer) and isinstance(results[4], Answer)
    await house.check_nothing_is_held()


@pytest.mark.parametrize("arch", ["llama", "bert"])
async def test_embeddings_of_several(arch: str, start: Start, base: Path, tmp_path: Path) -> None:
    """Adapters of the same task, that bring no head, are summed for it, too; classifiers bring
    one."""
    targets = ["q_proj", "down_proj"]
    if arch == "bert":
        base, targets = tiny_tokenizer(tiny_encoder(arch, tmp_path / "base")), ["query", "dense"]
    tasks = {"first": "FEATURE_EXTRACTION", "second": "FEATURE_EXTRACTION", "class": "SEQ_CLS"}
    made = {
        name: make_task_adapter(
            base, tmp_path / name, task, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets)
        )
        for name, task in tasks.items()
    }
    house = await start(model=base)
    house.fetch.directories |= made
    both = key(first=0.75, second=-1.5)
    pooled = await house.pool(PROMPT, both, PooledTask.EMBED, rows=Rows.LAST)
    model = concatenated(
        task_model(base, "FEATURE_EXTRACTION"), made, {"first": 0.75, "second": -1.5}
    )
    with torch.inference_mode():
        right = model(input_ids=torch.tensor([PROMPT]))[0][0, -1]
        plain = task_model(base, "FEATURE_EXTRACTION")(input_ids=torch.tensor([PROMPT]))[0][0, -1]
    torch.testing.assert_close(torch.from_numpy(pooled.values[0]), right, rtol=0, atol=1e-4)
    assert float((right - plain).abs().max()) > 1e-2
    with pytest.raises(FailedPrecondition, match="found a head"):
        await house.pool(PROMPT, key(**{"class": 0.5}), PooledTask.CLASSIFY)
    with pytest.raises(FailedPrecondition, match="another task"):
        await house.pool(PROMPT, both, PooledTask.CLASSIFY)
    await house.check_nothing_is_held()
