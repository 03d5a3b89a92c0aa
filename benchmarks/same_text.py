"""How often a request's answer is the same alone and among 31 neighbours on other adapters.

float32: always (the tests hold that). bfloat16: the base products round differently for different
numbers of rows, so near-ties may fall the other way; this counts how often.

    python benchmarks/same_text.py MODEL
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from in_process import Steps, adapter_folders
from workloads import WORKLOADS

from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import AdapterKey, Request, SamplingParams

PROMPTS = (
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "List three colours.",
    "Explain what a database index is.",
    "Say hello in four languages.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is 12 times 12?",
)
NEIGHBOURS = 32
TOKENS = 64


async def same_texts(model: Path, dtype: str, scratch: Path) -> tuple[int, int]:
    """(answers that were the same, answers), greedy, 64 tokens, 32 adapters of rank 16."""
    folders = adapter_folders(WORKLOADS["distinct-32"], model, scratch)
    settings = EngineSettings(model=model, dtype=dtype, prefix_cache=False)
    engine = AsyncEngine(settings, lambda digest: folders[int(digest)], Steps())
    await engine.start()
    try:
        together = await asyncio.gather(*(_answer(engine, i) for i in range(NEIGHBOURS)))
        alone = [await _answer(engine, i) for i in range(NEIGHBOURS)]
    finally:
        await engine.stop()
    return sum(a == b for a, b in zip(alone, together, strict=True)), NEIGHBOURS


async def _answer(engine: AsyncEngine, number: int) -> list[int]:
    request = Request(
        id=str(number),
        prompt=engine.tokenizer.encode(PROMPTS[number % len(PROMPTS)]),
        sampling=SamplingParams(max_tokens=TOKENS),
        adapter=AdapterKey(str(number), f"bench/a{number}@1"),
    )
    tokens: list[int] = []
    async for delta in engine.stream(request):
        tokens += delta.token_ids
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("float32", "bfloat16"):
            same, total = asyncio.run(same_texts(model, dtype, Path(scratch)))
            print(json.dumps({"dtype": dtype, "same": same, "answers": total}))


if __name__ == "__main__":
    main()
