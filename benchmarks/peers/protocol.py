"""What the runner and a contender say to each other: one line of JSON each, over stdin and stdout.

The runner starts the script with a `Spec` as its argument. The script loads and says {"ready": …};
then it answers each `Batch` on stdin with an `Outcome`, until stdin ends. Standard library only,
any Python from 3.10: every peer's interpreter imports this file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Spec:
    """What a contender is to be ready for.

    adapters: directories of PEFT checkpoints, all of them known at start. resident: how many of
    them it has memory for. sequences: most requests at once. context: most tokens of one request,
    prompt and answer.
    """

    model: str
    scratch: str  # a directory of its own to write in
    adapters: list[str] = field(default_factory=list)
    max_rank: int = 0
    resident: int = 0
    sequences: int = 32
    context: int = 192
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))


@dataclass
class Batch:
    """Requests that are made at once, greedy, end-of-text ignored. picks: each one's adapter by
    its place in the spec, -1 for the base."""

    prompts: list[list[int]]
    picks: list[int]
    output_tokens: int


@dataclass
class Outcome:
    """seconds: from the first request made to the last token. first, last: seconds from a
    request's making to its first and its last token, None where the contender cannot tell."""

    seconds: float
    tokens: int
    first: list[float] | None = None
    last: list[float] | None = None


Run = Callable[[Batch], Outcome]


def serve(start: Callable[[Spec], tuple[Run, Mapping[str, Any]]]) -> None:
    """The contender's side. start: loads, and gives what runs a batch and what "ready" tells."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # libraries that print do not garble the answers
        run, about = start(Spec(**json.loads(sys.argv[1])))
        print(json.dumps({"ready": dict(about)}), file=out, flush=True)
        for line in sys.stdin:
            outcome = run(Batch(**json.loads(line)))
            print(json.dumps(asdict(outcome)), file=out, flush=True)
