"""What the engine's tests share: a tiny base, twenty adapters, the oracle, engines of any size."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from manylora_testing import Oracle, tiny_lora, tiny_model
from manylora_testing.engine import House
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora.server.engine.settings import EngineSettings

# the same examples in every run, and as long as they take on a loaded machine
settings.register_profile("engine", deadline=None, derandomize=True)
settings.load_profile("engine")

TARGETS: tuple[list[str] | str, ...] = (
    ["q_proj", "v_proj"],
    "all-linear",
    ["o_proj", "down_proj"],
    ["gate_proj", "up_proj", "k_proj"],
)
Start = Callable[..., Awaitable[House]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama", directory, vocab_size=TOKENIZER_VOCAB, max_position_embeddings=256)
    return tiny_tokenizer(directory)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Digest → checkpoint: twenty of different ranks, targets and scales."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        f"adapter-{i}": tiny_lora(
            base, root / str(i), r=1 + i % 7, alpha=4 + i % 3, targets=TARGETS[i % 4], seed=i
        )
        for i in range(20)
    }


@pytest.fixture(scope="session")
def oracle(base: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(base, adapters)


@pytest.fixture
async def start(base: Path, adapters: dict[str, Path]) -> AsyncIterator[Start]:
    """Starts engines; arguments are EngineSettings'. They stop with the test."""
    started: list[House] = []

    async def make(**changes: Any) -> House:
        sizes: dict[str, Any] = {"kv_cache_bytes": 8 << 20, "adapter_bytes": 4 << 20}
        wanted = EngineSettings(**{"model": base, **sizes, **changes})
        started.append(House(wanted, dict(adapters)))
        await started[-1].engine.start()
        return started[-1]

    yield make
    for house in started:
        await house.stop()
