"""Rows to token ids, and which of them are to be learned.

A text is tokenized in the pieces that it will have in service: what the model is given, then what
it answers. So the answer's first token follows exactly the ids that a server sends for the
prompt, and no token straddles the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.training.rows import Chat, Completion, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not to be learned (torch's ignore_index)


@dataclass(slots=True, frozen=True)
class Example:
    """One row. `labels[i]` is `input_ids[i]` where that token is to be learned, else IGNORED."""

    input_ids: list[int]
    labels: list[int]


class Encoder:
    """A base model's tokenizer, as training needs it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int]) -> None:
        """end_ids: the tokens that end the model's answer.

        Raises FailedPrecondition if there is none.
        """
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        if tokenizer.eos_token_id is None:
            raise FailedPrecondition("the base's tokenizer has no end-of-text token", field="base")
        self._eos = int(tokenizer.eos_token_id)
        self._end_ids |= {self._eos}

    def encode_all(self, rows: Sequence[Row], max_length: int) -> list[Example]:
        """Raises InvalidArgument for rows of more than max_length tokens, naming the first."""
        examples = [self.encode(row) for row in rows]
        long = [i for i, example in enumerate(examples) if len(example.input_ids) > max_length]
        if long:
            raise InvalidArgument(
                f"{len(long)} of {len(rows)} rows are too long, this one first",
                field=rows[long[0]].where,
                found=f"{len(examples[long[0]].input_ids)} tokens",
                wanted=f"at most max_length = {max_length}",
            )
        return examples

    def encode(self, row: Row) -> Example:
        """Raises InvalidArgument or FailedPrecondition for a chat that the template refuses."""
        return self._completion(row) if isinstance(row, Completion) else self._chat(row)

    def _completion(self, row: Completion) -> Example:
        given = list(self._tokenizer.encode(row.prompt))
        answer = [*self._plain(row.completion), self._eos]
        return Example(given + answer, [IGNORED] * len(given) + answer)

    def _chat(self, row: Chat) -> Example:
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for i, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            given = self._render(row, i, prompt=True)
            whole = self._render(row, i + 1, prompt=False)
            if not (given.startswith(done) and whole.startswith(given)):
                raise FailedPrecondition(
                    "the base's chat template rewrites what came before an answer",
                    field=f"{row.where}: messages[{i}]",
                    wanted="one answer in each row, or another template",
                )
            if whole == given:
                raise InvalidArgument(
                    "the base's chat template leaves nothing of this answer",
                    field=f"{row.where}: messages[{i}].content",
                )
            prompt = self._plain(given[len(done) :])
            answer = self._plain(whole[len(given) :])
            learned = self._up_to_end(answer)
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + learned + [IGNORED] * (len(answer) - len(learned))
            done = whole
        return self._finish(ids, labels)

    def _finish(self, ids: list[int], labels: list[int]) -> Example:
        """Cuts what follows the last answer's end; adds an end where the template has none."""
        kept = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
        ids, labels = ids[:kept], labels[:kept]
        if ids[-1] not in self._end_ids:
            ids, labels = [*ids, self._eos], [*labels, self._eos]
        return Example(ids, labels)

    def _up_to_end(self, answer: list[int]) -> list[int]:
        text = list(takewhile(lambda token: token not in self._end_ids, answer))
        return answer[: len(text) + 1]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _render(self, row: Chat, count: int, *, prompt: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise FailedPrecondition(
                "the base model has no chat template",
                field=f"{row.where}: messages",
                wanted="rows of 'prompt' and 'completion'",
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [_as_dict(message) for message in row.messages[:count]],
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except Exception as error:  # jinja2 templates raise what they like
            raise InvalidArgument(
                "the base's chat template refuses these messages",
                field=f"{row.where}: messages",
                found=error,
            ) from error


def _as_dict(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
