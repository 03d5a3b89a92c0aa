"""From which of a prompt's tokens on its adapter acts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEVER = sys.maxsize


def acts_from(invocation: Sequence[int], prompt: Sequence[int]) -> int:
    """Position of the first token of the invocation's last occurrence in the prompt; NEVER where it
    has none. 0 for an adapter without invocation tokens, which always acts."""
    wanted = list(invocation)
    for start in range(len(prompt) - len(wanted), -1, -1):
        if prompt[start : start + len(wanted)] == wanted:
            return start if wanted else 0
    return NEVER if wanted else 0
