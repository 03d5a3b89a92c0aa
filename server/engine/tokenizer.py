"""The base model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from manylora.errors import FailedPrecondition, InvalidArgument


@dataclass(slots=True, frozen=True)
class ChatMessage:
    role: str  # "system", "user", "assistant", …: as the model's template knows them
    content: str


@dataclass(slots=True, frozen=True)
class Span:
    """Characters `start` to `end`, this one not included, of text 0 or of a pair's text 1."""

    start: int
    end: int
    text: int


@dataclass(slots=True, frozen=True)
class Encoded:
    """A prompt's tokens. types: one for each, or none where the tokenizer makes none."""

    ids: list[int]
    types: list[int] = field(default_factory=list)
    encoding: Encoding | None = None

    def spans(self) -> list[Span | None]:
        """Where each token stands in the text; None for special tokens, and where it is not
        known."""
        if self.encoding is None:
            return [None] * len(self.ids)
        return [
            None if text is None else Span(start, end, text)
            for text, (start, end) in zip(
                self.encoding.sequence_ids, self.encoding.offsets, strict=True
            )
        ]


class Tokenizer:
    """Thread-safe for encoding and decoding."""

    def __init__(self, path: Path) -> None:
        """Raises FailedPrecondition if the directory has no tokenizer."""
        try:
            self._hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise FailedPrecondition(
                "the base model has no readable tokenizer", field="model", found=error
            ) from error

    def encode(self, text: str, second: str | None = None) -> Encoded:
        """The tokens of a text or of a pair of texts, with the special tokens that the model's
        tokenizer adds."""
        found = self._hf(text, second)
        encodings = found.encodings  # None of a tokenizer in Python
        types = list(found.get("token_type_ids", ()))
        return Encoded(list(found["input_ids"]), types, encodings[0] if encodings else None)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens, spaces as the tokens have them."""
        return str(
            self._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def chat(self, messages: Sequence[ChatMessage]) -> Encoded:
        """The tokens of the messages through the model's chat template, ready for an answer.

        Raises FailedPrecondition if the model has no chat template, InvalidArgument if the
        template refuses the messages.
        """
        if self._hf.chat_template is None:
            raise FailedPrecondition(
                "the base model has no chat template", field="prompt.chat.messages"
            )
        rows = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self._hf.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2 templates raise what they like
            raise InvalidArgument(
                "the model's chat template refuses these messages",
                field="prompt.chat.messages",
                found=error,
            ) from error
        return Encoded(list(self._hf.encode(str(text), add_special_tokens=False)))
