from __future__ import annotations

from pathlib import Path

import pytest
from manylora_testing.tokenizer import tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.server.engine.tokenizer import ChatMessage, Tokenizer
from manylora.training.encode import IGNORED, Encoder, Example
from manylora.training.rows import Chat, Completion, Message

END_OF_TEXT = 2  # "</s>"
CLOSED = (  # a template that ends turns, as most do
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
FORGETFUL = "{% if add_generation_prompt %}<s>{% endif %}{{ messages[-1].content }}"
SILENT = "<s>{{ messages[0].content }}"


def load(directory: Path, template: str | None = CLOSED) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(directory, chat_template=template))


def pieces(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[tuple[bool, str]]:
    """The example's text, cut where what is to be learned begins and ends."""
    assert len(example.input_ids) == len(example.labels)
    found: list[tuple[bool, list[int]]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORED, token)
        if not found or found[-1][0] != (label == token):
            found.append((label == token, []))
        found[-1][1].append(token)
    return [(learned, tokenizer.decode(ids)) for learned, ids in found]


def chat(*turns: str) -> Chat:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns))
    return Chat("x.jsonl:1", messages)


def test_a_completion_is_learned_with_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    example = Encoder(tokenizer, []).encode(Completion("x.jsonl:1", "one plus one is", " two"))
    assert pieces(tokenizer, example) == [(False, "<s>one plus one is"), (True, " two</s>")]
    assert example.labels[-1] == END_OF_TEXT


def test_a_prompt_has_the_ids_that_a_server_gives_it(tmp_path: Path) -> None:
    encoder, server = Encoder(load(tmp_path), []), Tokenizer(tmp_path)
    completion = encoder.encode(Completion("", "the printer ", "is on fire"))
    prompt = server.encode("the printer ").ids
    assert completion.input_ids[: len(prompt)] == prompt
    assert completion.labels[: len(prompt)] == [IGNORED] * len(prompt)
    conversation = encoder.encode(chat("the printer", "naïve"))
    prompt = server.chat([ChatMessage("user", "the printer")]).ids
    assert conversation.input_ids[: len(prompt)] == prompt
    assert conversation.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert conversation.labels[len(prompt)] != IGNORED


def test_a_chat_learns_the_answer_up_to_its_end(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    example = Encoder(tokenizer, []).encode(chat("what?", "this"))
    assert pieces(tokenizer, example) == [
        (False, "<s>user: what?</s>\n<s>assistant: "),
        (True, "this</s>"),  # the template's line break after it is not
    ]


def test_every_answer_of_a_chat_is_learned_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    example = Encoder(tokenizer, []).encode(chat("what?", "this", "sure?", "yes"))
    assert pieces(tokenizer, example) == [
        (False, "<s>user: what?</s>\n<s>assistant: "),
        (True, "this</s>"),
        (False, "\n<s>user: sure?</s>\n<s>assistant: "),
        (True, "yes</s>"),
    ]


def test_a_template_without_an_end_gets_one(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "{% for m in messages %}<s>{{ m.content }}\n{% endfor %}<s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    example = Encoder(tokenizer, []).encode(chat("what?", "this"))
    assert pieces(tokenizer, example) == [(False, "<s>what?\n<s>"), (True, "this\n</s>")]


def test_the_models_own_end_tokens_end_an_answer(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, CLOSED.replace("</s>", "<pad>"))
    example = Encoder(tokenizer, [0]).encode(chat("what?", "this"))
    assert pieces(tokenizer, example)[-1] == (True, "this<pad>")


@pytest.mark.parametrize(
    ("template", "turns", "error", "field"),
    [
        (None, ("a", "b"), FailedPrecondition, "x.jsonl:1: messages"),
        (FORGETFUL, ("a", "b", "c", "d"), FailedPrecondition, "x.jsonl:1: messages[1]"),
        (SILENT, ("a", "b"), InvalidArgument, "x.jsonl:1: messages[1].content"),
        ("{{ raise_exception('no') }}", ("a", "b"), InvalidArgument, "x.jsonl:1: messages"),
    ],
)
def test_a_chat_that_does_not_fit_the_template_is_refused(
    tmp_path: Path,
    template: str | None,
    turns: tuple[str, ...],
    error: type[FailedPrecondition | InvalidArgument],
    field: str,
) -> None:
    encoder = Encoder(load(tmp_path, template), [])
    with pytest.raises(error) as caught:
        encoder.encode(chat(*turns))
    assert caught.value.field == field


def test_rows_that_are_too_long_are_refused_together(tmp_path: Path) -> None:
    rows = [Completion(f"x.jsonl:{i}", "a", "b" * i) for i in range(1, 5)]
    encoder = Encoder(load(tmp_path), [])
    assert len(encoder.encode_all(rows, 7)) == 4
    with pytest.raises(InvalidArgument, match="2 of 4 rows") as caught:
        encoder.encode_all(rows, 5)
    assert caught.value.field == "x.jsonl:3"
