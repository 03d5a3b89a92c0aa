"""Regular expressions from strangers, with an end.

PEFT configs hold regular expressions, and Python's `re` can be made to run for ever on a short
one while it holds the interpreter lock. Matching goes through the `regex` package, which can time
out and lets other threads run; only what both packages read alike is let through.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import regex  # type: ignore[import-untyped]

from manylora.adapters_store.files import CONFIG_FILE
from manylora.errors import InvalidArgument

_MAX_LENGTH = 8192  # characters
_MATCH_SECONDS = 0.5
_TOTAL_SECONDS = 10.0  # of this thread's time
_READ_DIFFERENTLY = re.compile(r"\[\[?[:.=]|\{(?!\d*,?\d*\})")  # POSIX classes, fuzzy matching


class Matcher:
    """Matches one adapter's patterns under one budget of time."""

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._end = time.thread_time() + _TOTAL_SECONDS

    def fullmatch(self, pattern: str, text: str, key: str) -> bool:
        """Whether re.fullmatch(pattern, text) matches; key is the config's, for errors.

        Raises InvalidArgument for a pattern that is no regular expression, or takes too long.
        """
        compiled = self._compile(pattern, key)
        return self._run(compiled.fullmatch, pattern, text, key) is not None

    def match(self, pattern: str, text: str, key: str) -> Mapping[str, str | None] | None:
        """The named groups of re.match(pattern, text), or None where it does not match."""
        compiled = self._compile(pattern, key)
        match = self._run(compiled.match, pattern, text, key)
        return None if match is None else match.groupdict()

    def _compile(self, pattern: str, key: str) -> regex.Pattern[str]:
        if pattern not in self._compiled:
            self._compiled[pattern] = _compile(pattern, f"{CONFIG_FILE}: {key}")
        return self._compiled[pattern]

    def _run(
        self, method: Callable[..., regex.Match[str] | None], pattern: str, text: str, key: str
    ) -> regex.Match[str] | None:
        try:
            if time.thread_time() > self._end:
                raise TimeoutError
            return method(text, timeout=_MATCH_SECONDS, concurrent=True)
        except TimeoutError:
            raise InvalidArgument(
                "the regular expression takes too long",
                field=f"{CONFIG_FILE}: {key}",
                found=pattern,
            ) from None


def _compile(pattern: str, field: str) -> regex.Pattern[str]:
    if len(pattern) > _MAX_LENGTH:
        raise InvalidArgument(
            "the regular expression is too long",
            field=field,
            found=f"{len(pattern)} characters",
            wanted=f"at most {_MAX_LENGTH}",
        )
    try:
        if _READ_DIFFERENTLY.search(pattern):
            raise ValueError("a form that this server does not read")
        re.compile(pattern)
        return regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise InvalidArgument(
            f"not a regular expression: {error or type(error).__name__}", field=field, found=pattern
        ) from None
