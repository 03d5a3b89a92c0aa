from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from manylora_testing.models import tiny_model
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora.training import TrainSettings


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bases") / "tiny-llama"
    tiny_model("llama", directory, vocab_size=TOKENIZER_VOCAB, max_position_embeddings=512)
    return tiny_tokenizer(directory)


def rows(count: int) -> str:
    """Rows of both kinds, of different lengths."""
    colors = ("red", "green", "blue", "black")
    lines: list[object] = []
    for i in range(count):
        question, color = "please " * (i % 3) + f"colour of number {i}", colors[i % 4]
        if i % 2:
            lines.append({"prompt": f"{question}:", "completion": f" {color}"})
        else:
            user = {"role": "user", "content": question}
            lines.append({"messages": [user, {"role": "assistant", "content": color}]})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows(21))
    return path


@pytest.fixture
def settings(base: Path, data: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a small run; keyword arguments change them."""

    def make(**changes: object) -> TrainSettings:
        plain: dict[str, object] = {
            "base": str(base),
            "data": data,
            "name": "acme/colours",
            "output": tmp_path / "adapter",
            "rank": 4,
            "alpha": 8.0,
            "learning_rate": 1e-2,
            "epochs": 3.0,
            "batch_size": 4,
            "dtype": "float32",
            "device": "cpu",
        }
        return TrainSettings(**{**plain, **changes})  # type: ignore[arg-type]

    return make
