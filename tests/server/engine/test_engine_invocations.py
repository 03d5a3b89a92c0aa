"""aLoRA: adapters that act from their invocation tokens on; what is before is the base's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from manylora_testing import Oracle
from manylora_testing.adapters import tiny_lora
from manylora_testing.engine import Answer, House
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.errors import FailedPrecondition
from manylora.server.engine.invocation import NEVER, acts_from

pytestmark = pytest.mark.filterwarnings("ignore")

Start = Callable[..., Awaitable[House]]
INVOKE = [60, 61]
OTHER = [62]
CONTEXT = list(range(70, 118))  # three blocks
TAIL = list(range(200, 215))


@pytest.fixture(scope="module")
def invoked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alora")
    tokens = {"first": INVOKE, "second": INVOKE, "other": OTHER}
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    return {
        name: tiny_lora(
            base,
            root / name,
            r=3,
            alpha=9,
            targets=targets[: 4 - i],
            seed=40 + i,
            alora_invocation_tokens=ids,
            lora_bias=i == 1,
        )
        for i, (name, ids) in enumerate(tokens.items())
    }


@pytest.fixture
async def house(start: Start, invoked: dict[str, Path]) -> House:
    house = await start(max_batch_tokens=8)
    house.fetch.directories |= invoked
    return house


@pytest.fixture(scope="module")
def model(base: Path, invoked: dict[str, Path]) -> Any:
    made: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    for name, directory in invoked.items():
        if isinstance(made, peft.PeftModel):
            made.load_adapter(directory, name)
        else:
            made = peft.PeftModel.from_pretrained(made, directory, adapter_name=name)
    return made.eval()


@torch.no_grad()
def generated(model: Any, adapter: str, prompt: Sequence[int], steps: int = 6) -> torch.Tensor:
    """peft's greedy generation: the logits [steps, vocab] of each of its tokens."""
    ids = torch.tensor([list(prompt)])
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    asked = {"output_logits": True, "return_dict_in_generate": True, **options}
    if adapter:
        model.set_adapter(adapter)
        out = model.generate(input_ids=ids, **asked)
    else:
        with model.disable_adapter():
            out = model.get_base_model().generate(input_ids=ids, **asked)
    return torch.cat(out.logits)


def check(model: Any, adapter: str, prompt: list[int], answer: Answer) -> None:
    rows = generated(model, adapter, prompt, len(answer.tokens)).log_softmax(dim=-1)
    assert answer.tokens == rows.argmax(dim=-1).tolist()
    for row, found in zip(rows, answer.logprobs, strict=True):
        for entry in found.top:
            assert abs(float(row[entry.token_id]) - entry.logprob) < 1e-4


async def ask(house: House, adapter: str, prompt: list[int]) -> Answer:
    return await house.ask(prompt, adapter, max_tokens=6, ignore_eos=True, logprobs=20)


PROMPTS = [
    [*CONTEXT, *INVOKE, 9],  # at a block's start
    [*CONTEXT[:15], *INVOKE, 9, 8],  # across two blocks, and two chunks
    [*INVOKE, *CONTEXT[:5], *INVOKE, 9],  # the last one counts
    [*INVOKE, *CONTEXT],  # from the first token on
    [*CONTEXT[:9], *INVOKE],  # at the very end
    [*CONTEXT, INVOKE[0]],  # nowhere
    [INVOKE[0], INVOKE[0], INVOKE[1]],
]


async def test_mixed_batch_is_pefts(house: House, model: Any, oracle: Oracle) -> None:
    names = ["first", "second", "other", ""]
    asked = [(name, prompt) for prompt in PROMPTS for name in names]
    asked += [("other", [*CONTEXT, *OTHER, 9]), ("adapter-1", PROMPTS[0])]
    for _ in range(2):  # the second time, much comes out of the cache
        answers = await asyncio.gather(*(ask(house, *request) for request in asked))
        for (name, prompt), answer in zip(asked, answers, strict=True):
            if name == "adapter-1":
                assert answer.tokens == oracle.greedy(name, prompt, len(answer.tokens))
            else:
                check(model, name, prompt, answer)
    first, base = (answers[asked.index((name, PROMPTS[0]))] for name in ("first", ""))
    assert first.tokens != base.tokens
    nowhere = answers[asked.index(("first", PROMPTS[5]))]
    assert nowhere.tokens == answers[asked.index(("", PROMPTS[5]))].tokens
    await house.check_nothing_is_held()


async def test_an_answers_own_invocation_changes_nothing(house: House, model: Any) -> None:
    """Only the prompt's counts, as in peft's generate."""
    prompt = [*CONTEXT[:3], 9]
    tokens = (await ask(house, "", prompt)).tokens
    made = [*prompt, *tokens]
    again = [*made[:-2], *INVOKE]
    check(model, "first", again, await ask(house, "first", again))


async def test_blocks_before_are_shared_with_the_base(house: House, model: Any) -> None:
    async def cached(name: str, prompt: list[int]) -> int:
        answer = await ask(house, name, prompt)
        check(model, name, prompt, answer)
        assert answer.usage is not None
        return answer.usage.cached_tokens

    prompt = [*CONTEXT, *INVOKE, *TAIL]
    assert await cached("first", prompt) == 0
    assert await cached("second", prompt) == 48  # all before the invocation, and no more
    assert await cached("", [*CONTEXT, 9]) == 48
    assert await cached("other", [*CONTEXT, *OTHER, 9, 8]) == 48
    assert await cached("first", prompt) == 64
    later = [*CONTEXT, *INVOKE, *TAIL[:14], *INVOKE, 5]  # the same tokens, but not acted on yet
    assert await cached("first", later) == 48
    assert await cached("", later) == 64
    assert await cached("first", later) == 64
    inside = [*CONTEXT[:46], *INVOKE, *CONTEXT[:18]]
    assert await cached("", inside) == 32
    assert await cached("first", inside) == 32  # not the base's third block
    assert await cached("second", inside) == 32
    assert await cached("first", inside) == 64
    await house.check_nothing_is_held()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
async def test_one_that_overflows_leaves_the_bases_blocks_whole(
    start: Start, base: Path, tmp_path: Path, model: Any, kernels: str
) -> None:
    """Though its rows come in one prompt with them, and kernels may let a NaN pass to all of one
    sequence's rows in a step."""
    options: Any = {"targets": ["v_proj"], "alora_invocation_tokens": INVOKE}
    tiny_lora(base, tmp_path, r=3, alpha=3, seed=1, **options)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    huge = {name: torch.full_like(tensor, 1e30) for name, tensor in weights.items()}
    save_file(huge, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    house = await start(kernels=kernels, max_batch_tokens=64)
    house.fetch.directories["wild"] = tmp_path
    with pytest.raises(FailedPrecondition, match="not finite"):
        await ask(house, "wild", [*CONTEXT, *INVOKE, 9])
    answer = await ask(house, "", [*CONTEXT, 9])
    check(model, "", [*CONTEXT, 9], answer)
    assert answer.usage is not None and answer.usage.cached_tokens == 48
    await house.check_nothing_is_held()


async def test_blocks_are_held_once(start: Start, invoked: dict[str, Path], model: Any) -> None:
    """While they run together, too."""
    house = await start(max_batch_tokens=64)
    house.fetch.directories |= invoked
    names = ["first", "second", "other", ""]
    prompts = [[*CONTEXT, *(OTHER if name == "other" else INVOKE), 9] for name in names]
    await asyncio.gather(*(house.load(name) for name in names if name))
    check(model, "", prompts[3], await ask(house, "", prompts[3]))
    house.seen.steps.clear()
    answers = await asyncio.gather(*map(ask, [house] * 4, names, prompts))
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        check(model, name, prompt, answer)
    together = [s.stats for s in house.seen.steps if s.sequences == 4]
    assert together
    most = max(stats.blocks_total - stats.blocks_free for stats in together)
    assert most <= 3 + 4  # and not 4 * 4
    await house.check_nothing_is_held()


async def test_preempted(start: Start, invoked: dict[str, Path], model: Any) -> None:
    """So few blocks that sequences are computed again, from before and behind the invocation."""
    house = await start(kv_cache_bytes=7 * 16 * 2 * 2 * 16 * 2 * 4)
    house.fetch.directories |= invoked
    prompts = [[*CONTEXT[: 5 + i], *INVOKE, 70 + i] for i in range(5)]
    names = ["first", "second", "first", "", "second"]
    answers = await asyncio.gather(
        *(
            house.ask(prompt, name, max_tokens=15, ignore_eos=True, logprobs=3)
            for prompt, name in zip(prompts, names, strict=True)
        )
    )
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        check(model, name, prompt, answer)
    await house.check_nothing_is_held()


@pytest.mark.parametrize(
    ("invocation", "prompt", "wanted"),
    [
        ([], [1, 2], 0),
        ([1], [1, 2, 1, 3], 2),
        ([1, 2], [1, 1, 2, 1], 1),
        ([1, 1], [1, 1, 1], 1),
        ([1, 2], [1, 2], 0),
        ([1, 2, 3], [1, 2], NEVER),
        ([4], [1, 2], NEVER),
    ],
)
def test_acts_from(invocation: list[int], prompt: list[int], wanted: int) -> None:
    assert acts_from(invocation, prompt) == wanted


@given(st.lists(st.integers(0, 1), max_size=5), st.lists(st.integers(0, 1), max_size=24))
def test_acts_from_by_definition(invocation: list[int], prompt: list[int]) -> None:
    ends = range(len(invocation), len(prompt) + 1)
    starts = [
        end - len(invocation) for end in ends if prompt[:end][-len(invocation) :] == invocation
    ]
    assert acts_from(invocation, prompt) == (max(starts, default=NEVER) if invocation else 0)


class Counted(int):
    """A token that counts how often it is compared."""

    compared = 0
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return isinstance(other, int) and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


@pytest.mark.parametrize("odd", [0, 199])
def test_long_invocations_hold_nobody_up(odd: int) -> None:
    Counted.compared = 0
    invocation = [Counted(6 if i == odd else 5) for i in range(200)]
    assert acts_from(invocation, [Counted(5) for _ in range(400)]) == NEVER
    assert Counted.compared < 4 * 600
