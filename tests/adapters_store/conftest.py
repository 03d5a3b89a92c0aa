"""Checkpoints written by hand, for tests that bend them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import save_file

from manylora.adapters_store.store import Store

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


class WriteCheckpoint(Protocol):
    def __call__(
        self,
        directory: Path,
        *,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        size: int = 8,
    ) -> Path: ...


def lora_tensors(seed: int, size: int, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (rank, size), "lora_B": (size, rank)}
    return {
        f"base_model.model.{module}.{side}.weight": torch.randn(shape, generator=generator)
        for module in MODULES
        for side, shape in shapes.items()
    }


@pytest.fixture(scope="session")
def write_checkpoint() -> WriteCheckpoint:
    """Writes a sound LoRA checkpoint, or one with changed config keys or with other tensors."""

    def write(
        directory: Path,
        *,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        size: int = 8,
    ) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**CONFIG, **(config or {})})
        (directory / "adapter_config.json").write_text(text)
        weights = lora_tensors(seed, size) if tensors is None else dict(tensors)
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        return directory

    return write


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = Store(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture(scope="session")
def assert_whole() -> Callable[[Path], None]:
    """Asserts that a store has nothing but whole versions: no orphan, nothing staged."""

    def check(root: Path) -> None:
        store = Store(root)
        try:
            listed = [
                version
                for newest in store.list(page_size=1000).versions
                for version in store.versions(str(newest.name))
            ]
            for version in listed:
                path = store.open_object(version.digest)
                sizes = [file.stat().st_size for file in path.iterdir()]
                assert len(sizes) == 2
                assert sum(sizes) == version.size_bytes
            on_disk = {path.name for path in (root / "objects").glob("*/*")}
            assert on_disk == {version.digest for version in listed}
            assert not list((root / "staging").iterdir())
        finally:
            store.close()

    return check
