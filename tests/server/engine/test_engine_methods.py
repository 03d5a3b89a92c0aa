"""What is no low-rank edit (norms, embeddings, heads, tokens before the prompt) while adapters
move, come back and break."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing import tiny_lora
from manylora_testing.classifiers import make_task_adapter, peft_answer
from manylora_testing.engine import House
from manylora_testing.methods import make_method, peft_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.errors import FailedPrecondition
from manylora.server.engine.pool import Pool
from manylora.server.engine.types import PooledTask, ResidencyState

pytestmark = pytest.mark.filterwarnings("ignore")

Start = Callable[..., Awaitable[House]]
PROMPT = [9, 8, 7, 70, 50, 92, 11]
METHODS = (
    "ln-tuning",
    "tokens",
    "lora-embedding",
    "lora-embedding-saved",
    "lora-head-saved",
    "lora-norms-saved",
    "prompt",
    "prefix",
)
HUGE = 1e37
BROKEN = ("bad-ln-tuning", "bad-lora-head-saved", "bad-lora-norms-saved", "bad-classes")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    made = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    return made.eval()


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("methods")
    return {method: make_method(method, "llama", model, root / method) for method in METHODS}


@pytest.fixture(scope="module")
def classifiers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {
        f"classes-{labels}": make_task_adapter(
            base,
            root / str(labels),
            "SEQ_CLS",
            peft.LoraConfig(r=2, target_modules=["q_proj"]),
            labels,
        )
        for labels in (2, 3, 5)
    }


def check(model: Any, adapter: Path | None, tokens: list[int]) -> None:
    rows = peft_rows(model, adapter, [*PROMPT, *tokens])
    assert tokens == rows[len(PROMPT) - 1 : -1].argmax(dim=-1).tolist()


def broken(adapter: Path, directory: Path) -> Path:
    """The same with numbers so large that what it computes is no number any more."""
    directory.mkdir()
    config = (adapter / "adapter_config.json").read_text()
    (directory / "adapter_config.json").write_text(config)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "base_layer" not in name:  # the base's own, which must be equal to it
            tensors[name] = tensor.sign() * HUGE
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("method", METHODS)
async def test_one_that_moves_goes_on_as_before(
    method: str,
    start: Start,
    base: Path,
    model: Any,
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it in the pool an adapter leaves a gap, which a larger one's coming closes."""
    loras = {
        name: tiny_lora(base, tmp_path / name, r=rank, alpha=4, targets="all-linear", seed=rank)
        for name, rank in (("first", 5), ("larger", 8))
    }
    large = await start()
    large.fetch.directories |= {**loras, method: made[method]}
    sizes = {name: (await large.load(name)).bytes for name in (*loras, method)}
    moves = []
    compact = Pool.compact
    monkeypatch.setattr(Pool, "compact", lambda pool: moves.append(compact(pool)))
    house = await start(adapter_bytes=2 * sizes["first"] + sizes[method])
    house.fetch.directories |= {**loras, method: made[method]}
    await house.load("first")
    request = house.request(PROMPT, method, max_tokens=40, ignore_eos=True)
    stream = house.engine.stream(request)
    tokens = (await anext(stream)).token_ids
    await house.unload("first")
    assert not moves
    await house.load("larger")
    assert moves
    async for delta in stream:
        tokens += delta.token_ids
    check(model, made[method], tokens)
    again = await house.ask(PROMPT, method, max_tokens=8, ignore_eos=True)
    assert again.tokens == tokens[:8]
    await house.check_nothing_is_held()


async def test_heads_that_come_and_go(
    start: Start, base: Path, classifiers: dict[str, Path]
) -> None:
    house = await start(max_adapters=1)
    house.fetch.directories |= classifiers
    for _ in range(2):
        for name, directory in classifiers.items():
            answer = await house.pool(PROMPT, name, PooledTask.CLASSIFY)
            right = peft_answer(base, directory, "SEQ_CLS", PROMPT)
            assert float((torch.from_numpy(answer.values[0]) - right).abs().max()) < TOLERANCE
            assert len(answer.labels) == len(right)
    states = [event.state for event in house.seen.residencies]
    assert states.count(ResidencyState.EVICTED) == 2 * len(classifiers) - 1
    await house.check_nothing_is_held()


async def test_a_broken_one_breaks_nobody_else(
    start: Start,
    base: Path,
    model: Any,
    made: dict[str, Path],
    classifiers: dict[str, Path],
    tmp_path: Path,
) -> None:
    """A sound and a broken adapter of each method, the base and classes, all in the same steps."""
    bad = {f"bad-{name}": broken(made[name], tmp_path / name) for name in METHODS}
    bad_head = broken(classifiers["classes-3"], tmp_path / "classes")
    house = await start(max_batch_tokens=2048)
    house.fetch.directories |= {**made, **bad, **classifiers, "bad-classes": bad_head}
    for name in (*made, *bad, *classifiers, "bad-classes"):
        await house.load(name)
    sound = ["", *made, *classifiers]

    async def ask(name: str) -> Any:
        if "classes" in name:
            return await house.pool(PROMPT, name, PooledTask.CLASSIFY)
        return await house.ask(PROMPT, name, max_tokens=12, ignore_eos=True)

    names = [*sound, *bad, "bad-classes"]
    answers = await asyncio.gather(*map(ask, names), return_exceptions=True)
    assert max(step.sequences for step in house.seen.steps) > len(sound)
    for name, answer in zip(names, answers, strict=True):
        if name in BROKEN:
            assert isinstance(answer, FailedPrecondition), (name, answer)
            assert "not finite" in str(answer)
        elif name.startswith("bad-"):
            continue  # what a norm or a softmax makes of such numbers is nobody else's affair
        elif name in classifiers:
            right = peft_answer(base, classifiers[name], "SEQ_CLS", PROMPT)
            assert float((torch.from_numpy(answer.values[0]) - right).abs().max()) < TOLERANCE
        else:
            check(model, made.get(name), answer.tokens)
    await house.check_nothing_is_held()
