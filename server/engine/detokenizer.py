"""Token ids to text as they come, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

CONTEXT = 6  # prompt tokens decoded along, so that a leading space comes out right
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not yet a character


class Detokenizer:
    """Incremental decoding that never emits half a character.

    Args:
        decode: token ids → text, special tokens left out.
        prompt: the prompt's token ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._emitted = decode(self._ids)

    def push(self, token: int) -> str:
        """The text that is certain after one more token; "" while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) or len(text) < len(self._emitted):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is left at the end; an incomplete character comes out as U+FFFD."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._emitted) :]
        self._ids = self._ids[-CONTEXT:]
        self._emitted = self._decode(self._ids)
        return new


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
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
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
