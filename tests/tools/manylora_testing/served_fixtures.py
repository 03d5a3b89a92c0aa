"""Fixtures of the tests that talk to a server: import them in a conftest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.adapters_store.limits import Limits
from manylora.server.engine.settings import EngineSettings
from manylora_testing.adapters import tiny_lora
from manylora_testing.models import tiny_model
from manylora_testing.served import Served, served
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

CONTEXT = 4096
LIMITS = Limits(max_config_bytes=64 << 10, max_weights_bytes=1 << 20)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama", directory, vocab_size=TOKENIZER_VOCAB, max_position_embeddings=CONTEXT)
    return tiny_tokenizer(directory)


@pytest.fixture(scope="session")
def adapter_dirs(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of different ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    targets = (["q_proj", "v_proj"], "all-linear", ["o_proj", "down_proj"])
    return [
        tiny_lora(base_model, root / str(i), r=2 + 2 * i, alpha=8, targets=modules, seed=i)
        for i, modules in enumerate(targets)
    ]


@pytest.fixture(scope="session")
def settings(base_model: Path) -> EngineSettings:
    return EngineSettings(model=base_model, kv_cache_bytes=16 << 20, adapter_bytes=4 << 20)


@pytest.fixture(scope="session")
def server(
    settings: EngineSettings, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One server for all tests that leave it as it was; each publishes below its own tenant."""
    roots = [adapter_dirs[0].parent]
    root = tmp_path_factory.mktemp("store")
    with served(settings, root, limits=LIMITS, import_roots=roots) as running:
        yield running


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant that no other test has."""
    return re.sub(r"[^a-z0-9-]", "-", f"{request.path.stem}-{request.node.name}".lower())[
        -60:
    ].strip("-")
