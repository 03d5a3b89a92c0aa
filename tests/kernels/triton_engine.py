"""A whole engine on the Triton kernels in the interpreter: a mixed batch, equal to the oracle.

What stands in for a GPU: all that its path executes except streams and graph capture.
Not collected by itself: test_triton.py runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from manylora_testing import Oracle, tiny_lora, tiny_model
from manylora_testing.engine import House
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora.server.engine.settings import EngineSettings

PROMPTS = {
    # adapter: the lengths of its prompts
    "": (3, 9),
    "few": (1, 17),
    "all": (6,),
}


async def test_a_mixed_batch_is_the_oracles(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llama", base, vocab_size=TOKENIZER_VOCAB, max_position_embeddings=64)
    tiny_tokenizer(base)
    adapters = {
        "few": tiny_lora(
            base, tmp_path / "few", r=3, alpha=4, targets=["q_proj", "down_proj"], seed=0
        ),
        "all": tiny_lora(base, tmp_path / "all", r=5, alpha=6, targets="all-linear", seed=1),
    }
    settings = EngineSettings(
        base,
        kernels="triton",
        device="cpu",
        block_size=4,
        kv_cache_bytes=1 << 18,
        adapter_bytes=1 << 18,
        max_adapters=4,
        max_batch_tokens=16,
    )
    house = House(settings, dict(adapters))
    await house.engine.start()
    asked = [
        (adapter, [3 + (7 * i + length) % 250 for i in range(length)])
        for adapter, lengths in PROMPTS.items()
        for length in lengths
    ]
    answers = await asyncio.gather(
        *(house.ask(prompt, adapter, max_tokens=4, ignore_eos=True) for adapter, prompt in asked)
    )
    await house.check_nothing_is_held()
    await house.stop()
    assert house.engine.info.kernels == "triton"
    oracle = Oracle(base, adapters)
    for (adapter, prompt), answer in zip(asked, answers, strict=True):
        assert answer.tokens == oracle.greedy(adapter or None, prompt, 4), (adapter, len(prompt))
