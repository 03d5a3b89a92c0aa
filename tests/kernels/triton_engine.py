"""A whole engine on the Triton kernels in the interpreter: mixed batches, equal to the oracle.

What stands in for a GPU: all that its path executes except streams and graph capture, of which
triton_capture.py has what can be had. Not collected by itself: test_triton.py runs it in a process
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from manylora_testing import Oracle, tiny_lora, tiny_model
from manylora_testing.engine import House
from manylora_testing.methods import make_method
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from transformers import AutoModelForCausalLM
from triton.runtime.interpreter import GridExecutor

from manylora.kernels.triton import tiles
from manylora.server.engine.settings import EngineSettings

EDITS = {"_shrink", "_expand"}
ATTENTION = {"_attend decode", "_attend chunk"}
FUSED = {"_norm", "_activate", "_rotary_write_kv"}
LAUNCHES = {
    "llama": EDITS | ATTENTION | FUSED | {"_scale_inputs", "_combine"},
    "bloom": EDITS | ATTENTION | {"_write_kv"},  # layers that are not fused; ALiBi
}
PROMPTS = {
    # adapter: the lengths of its prompts
    "": (3, 9),
    "few": (1, 17),
    "all": (6,),
    "ia3": (34,),
}
TOKENS = {False: 9, True: 3}  # of an answer, by whether it has an adapter: the base's last longest


class Launches:
    """What was launched, step by step; and whether one launch had several adapters' rows and the
    base's."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = [set()]
        self.mixed = False

    def note(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if name == "_attend":
            name += " decode" if options["SPLIT"] else " chunk"
        if name == "_expand":
            rows, edited, segments = args[3][:3].tolist()
            self.mixed |= edited < rows and segments >= 2
        self.steps[-1].add(name)

    def next_step(self, _: object) -> None:
        self.steps.append(set())


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found, run = Launches(), GridExecutor.__call__

    def noted(executor: GridExecutor, *args: Any, **options: Any) -> None:
        found.note(executor.fn.__name__, args, options)
        run(executor, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    return found


@pytest.fixture
def few_keys_a_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a short decode already has parts to add up."""
    monkeypatch.setattr(tiles, "SPLIT_KEYS", 32)
    tiles.decode_tiles.cache_clear()
    yield
    tiles.decode_tiles.cache_clear()


def make_adapters(arch: str, base: Path, directory: Path) -> dict[str, Path]:
    few = ["q_proj", "down_proj"] if arch == "llama" else ["query_key_value"]
    adapters = {
        "few": tiny_lora(base, directory / "few", r=3, alpha=4, targets=few, seed=0),
        "all": tiny_lora(base, directory / "all", r=5, alpha=6, targets="all-linear", seed=1),
    }
    if arch == "llama":
        model = AutoModelForCausalLM.from_pretrained(base)
        adapters["ia3"] = make_method("ia3", arch, model, directory / "ia3")
    return adapters


@pytest.mark.usefixtures("few_keys_a_program")
@pytest.mark.parametrize("arch", LAUNCHES)
async def test_mixed_batches_are_the_oracles(arch: str, tmp_path: Path, launches: Launches) -> None:
    base = tmp_path / "base"
    tiny_model(arch, base, vocab_size=TOKENIZER_VOCAB, max_position_embeddings=64)
    tiny_tokenizer(base)
    adapters = make_adapters(arch, base, tmp_path)
    settings = EngineSettings(
        base,
        kernels="triton",
        device="cpu",
        block_size=16,
        kv_cache_bytes=1 << 20,
        adapter_bytes=1 << 18,
        max_adapters=4,
        max_batch_tokens=16,
    )
    house = House(settings, dict(adapters))
    warm = set().union(*launches.steps)
    assert warm >= LAUNCHES[arch] - {"_scale_inputs"}, "compiled while somebody waits"
    house.seen.at_step = launches.next_step
    await house.engine.start()
    for adapter in adapters:
        await house.load(adapter)
    launches.steps = [set()]  # without those of the engine's own checks
    asked = [
        (adapter, [3 + (7 * i + length) % 250 for i in range(length)])
        for adapter, lengths in PROMPTS.items()
        for length in lengths
        if not adapter or adapter in adapters
    ]
    answers = await asyncio.gather(
        *(
            house.ask(prompt, adapter, max_tokens=TOKENS[bool(adapter)], ignore_eos=True)
            for adapter, prompt in asked
        )
    )
    await house.check_nothing_is_held()
    await house.stop()
    assert house.engine.info.kernels == "triton"
    assert launches.mixed
    assert any(step >= ATTENTION for step in launches.steps), "no chunk beside a decode"
    assert set().union(*launches.steps) == LAUNCHES[arch]
    oracles = {name: Oracle(base, {name: path}) for name, path in adapters.items()}
    oracles[""] = Oracle(base, {})
    for (adapter, prompt), answer in zip(asked, answers, strict=True):
        wanted = oracles[adapter].greedy(adapter or None, prompt, TOKENS[bool(adapter)])
        assert answer.tokens == wanted, (adapter, len(prompt))
