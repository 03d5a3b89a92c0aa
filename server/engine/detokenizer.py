"""Token ids to text as they come, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 6  # prompt tokens decoded along at first, so that a leading space comes out right
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not yet a character
LONGEST = 4  # bytes of a character, so tokens that may share one
MOST_HELD = 128  # tokens that may pass without text; more of them are no character's beginning


class Detokenizer:
    """Incremental decoding that never emits half a character.

    Decodes a window: the tokens of the text that went out last, and those after it. A window
    begins with a character and has visible text before what is new, so its decoding goes on
    like that of all tokens.

    Args:
        decode: token ids → text, special tokens left out.
        prompt: the prompt's token ids. A character that it leaves half is the answer's.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = _end_of(prompt, decode)
        self._fresh = len(self._ids)  # where in the window the tokens after _emitted begin
        self._emitted = decode(self._ids)
        self._complete = _without_half_character(self._ids, decode)

    def push(self, token: int) -> str:
        """The text that is certain after one more token; "" while a character is incomplete.

        Its cost has a bound, whatever the tokens: one stream's must not hold up the others.
        """
        self._ids.append(token)
        text = self._decode(self._ids)
        new = self._beyond(text)
        too_many = len(self._ids) - self._fresh >= MOST_HELD
        if not new:
            if too_many:  # special tokens: the text is the same without them
                del self._ids[self._fresh : -LONGEST]
            return ""
        if text.endswith(REPLACEMENT) and not too_many:
            return ""
        self._ids = self._ids[self._fresh :]
        self._fresh = len(self._ids)
        self._emitted = self._decode(self._ids)
        self._complete = _without_half_character(self._ids, self._decode)
        return new

    def flush(self) -> str:
        """What is left at the end; an incomplete character comes out as U+FFFD."""
        return self._beyond(self._decode(self._ids))

    def _beyond(self, text: str) -> str:
        known = self._emitted if text.startswith(self._emitted) else self._complete
        return text[len(known) :]


def _end_of(prompt: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The prompt's last tokens, as many as it takes to begin with a character."""
    size = CONTEXT
    while True:
        ids = list(prompt[-size:])
        text = decode(ids)
        if size >= len(prompt) or (text and not text.startswith(REPLACEMENT)):
            return ids
        size *= 2


def _without_half_character(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    for end in range(len(ids), max(len(ids) - LONGEST, -1), -1):
        text = decode(ids[:end])
        if not text.endswith(REPLACEMENT):
            return text
    return decode(ids)


class StopStrings:
    """Holds text back while it may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may go out, and whether a stop string has come (it and what follows are
        dropped)."""
        if not self._stops:
            return text, False
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            _, start = min(found)  # the first to be complete, however the text was cut
            return held[:start], True
        keep = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
