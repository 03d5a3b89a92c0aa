"""From which of a prompt's tokens on its adapter acts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEVER = sys.maxsize


def acts_from(invocation: Sequence[int], prompt: Sequence[int]) -> int:
    """Position of the first token of the invocation's last occurrence in the prompt; NEVER where it
    has none. 0 for an adapter without invocation tokens, which always acts.

    Looks from the end, in time linear in both (Knuth, Morris and Pratt 1977).
    """
    if not invocation:
        return 0
    wanted = invocation[::-1]
    borders = _borders(wanted)
    found = 0
    for position in range(len(prompt) - 1, -1, -1):
        while found and prompt[position] != wanted[found]:
            found = borders[found - 1]
        found += prompt[position] == wanted[found]
        if found == len(wanted):
            return position
    return NEVER


def _borders(tokens: Sequence[int]) -> list[int]:
    """For each beginning of the tokens, the length of the longest shorter one that it ends with."""
    borders = [0]
    for token in tokens[1:]:
        length = borders[-1]
        while length and token != tokens[length]:
            length = borders[length - 1]
        borders.append(length + (token == tokens[length]))
    return borders
