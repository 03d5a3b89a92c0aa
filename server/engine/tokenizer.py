"""The base model's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from manylora.errors import FailedPrecondition, InvalidArgument


@dataclass(slots=True, frozen=True)
class ChatMessage:
    role: str  # "system", "user", "assistant", …: as the model's template knows them
    content: str


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

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model's tokenizer adds."""
        return list(self._hf.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens, spaces as the tokens have them."""
        return str(
            self._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of the messages through the model's chat template, ready for an answer.

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
        return list(self._hf.encode(str(text), add_special_tokens=False))
