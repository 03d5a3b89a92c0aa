"""The whole demo with a tiny random base: trainer, store, server process and client are real."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from manylora_testing.models import tiny_model
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from rich.console import Console

import manylora.demo.run
from manylora.demo import DemoSettings, run_demo
from manylora.demo.serving import serving
from manylora.demo.tasks import TASKS
from manylora.errors import Unavailable

SHORT = [replace(task, epochs=0.3, max_tokens=4) for task in TASKS]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-llama"
    tiny_model("llama", directory, vocab_size=TOKENIZER_VOCAB, max_position_embeddings=1024)
    return tiny_tokenizer(directory)


def test_the_second_run_trains_nothing_and_answers_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manylora.demo.run, "TASKS", SHORT)
    settings = DemoSettings(base=base, cache=tmp_path / "cache")
    shown = [io.StringIO(), io.StringIO()]
    first, second = (run_demo(settings, Console(file=file, width=160)) for file in shown)
    assert [load.adapter for load in first.loads] == [f"{task.adapter}@1" for task in TASKS]
    assert second.comparisons == first.comparisons
    assert [load.digest for load in second.loads] == [load.digest for load in first.loads]
    for result, task in zip(first.comparisons, SHORT, strict=True):
        assert result.task == task
        assert result.adapter.rows == result.base.rows == len(task.held_out())
    assert first.mixed_tokens_per_second > 0
    assert "before" not in shown[0].getvalue()
    assert shown[1].getvalue().count("before") == len(TASKS)
    for text in ("demo/orders@1", "one mixed batch: 12 streams", "tokens/s", "loaded in"):
        assert text in shown[0].getvalue()


def test_a_server_that_cannot_start_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(Unavailable, match="did not start"),
        serving(tmp_path / "none", tmp_path / "store", tmp_path / "log"),
    ):
        pass
