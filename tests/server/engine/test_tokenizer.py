"""The base's own tokenizer and chat template."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from manylora_testing.tokenizer import tiny_tokenizer
from transformers import AutoTokenizer

from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.server.engine.tokenizer import ChatMessage, Tokenizer

TEXTS = ("", "the printer is on fire", "naïve café, 東京 😀", "  two  spaces \n", "</s> in a text")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_without_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text.replace("</s>", "")


def test_spaces_are_left_as_they_are(tokenizer: Tokenizer) -> None:
    text = "a , b . it 's n't"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_chat_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    directory = tiny_tokenizer(tmp_path)
    rows = [("system", "Be brief."), ("user", "On fire!"), ("assistant", "What?"), ("user", "It")]
    messages = [ChatMessage(role, content) for role, content in rows]
    wanted = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [{"role": role, "content": content} for role, content in rows],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert Tokenizer(directory).chat(messages).ids == wanted


def test_messages_that_the_template_refuses(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="unknown role"):
        tokenizer.chat([ChatMessage("wizard", "hi")])


def test_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no chat template"):
        Tokenizer(tiny_tokenizer(tmp_path, chat_template=None)).chat([ChatMessage("user", "hi")])


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no readable tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FailedPrecondition, match="no readable tokenizer"):
        Tokenizer(tmp_path)


def test_threads_may_share_it(tokenizer: Tokenizer) -> None:
    texts = [text * 20 for text in TEXTS[1:4]] * 20
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda text: tokenizer.decode(tokenizer.encode(text).ids), texts))
    assert found == texts
