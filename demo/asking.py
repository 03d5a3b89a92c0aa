"""What the demo asks of the server, over gRPC, many requests at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manylora.client import AsyncClient
from manylora.demo.tasks import Example, Task

_AT_ONCE = 64


@dataclass(slots=True)
class Answer:
    """One prompt's answer by one adapter ("" is the base), as far as it has come."""

    example: Example
    adapter: str
    text: str = ""
    tokens: int = 0
    done: bool = False


@dataclass(slots=True, frozen=True)
class Score:
    """One model's answers to a task's held-out rows."""

    mean: float  # 0 to 1
    perfect: int  # answers with the full score
    rows: int


@dataclass(slots=True, frozen=True)
class Comparison:
    task: Task
    base: Score
    adapter: Score


async def stream_together(client: AsyncClient, answers: Sequence[Answer], max_tokens: int) -> float:
    """Streams all answers at the same time. Returns the tokens of all of them in a second."""

    async def stream(answer: Answer) -> None:
        parts = client.stream(
            messages=_messages(answer.example),
            adapter=answer.adapter,
            max_tokens=max_tokens,
            temperature=0.0,
        )
        async for part in parts:
            answer.text += part.text
            answer.tokens += len(part.token_ids)
            answer.done = part.finish_reason is not None

    began = time.monotonic()
    await asyncio.gather(*(stream(answer) for answer in answers))
    return sum(answer.tokens for answer in answers) / (time.monotonic() - began)


async def compare(
    client: AsyncClient, versions: Sequence[tuple[Task, str]], advance: Callable[[], None]
) -> tuple[list[Comparison], float]:
    """Asks the base and each task's adapter for every held-out row of that task, all mixed.

    Returns the scores, and the tokens of all answers in a second.
    """
    room = asyncio.Semaphore(_AT_ONCE)
    tokens = 0

    async def score(task: Task, example: Example, adapter: str) -> float:
        nonlocal tokens
        async with room:
            answer = await client.generate(
                messages=_messages(example),
                adapter=adapter,
                max_tokens=task.max_tokens,
                temperature=0.0,
            )
        tokens += answer.usage.completion_tokens
        advance()
        return task.score(answer.text, example)

    async def score_all(task: Task, adapter: str) -> Score:
        scores = await asyncio.gather(*(score(task, e, adapter) for e in task.held_out()))
        perfect = sum(value == 1.0 for value in scores)
        return Score(sum(scores) / len(scores), perfect, len(scores))

    async def both(task: Task, adapter: str) -> Comparison:
        base, adapted = await asyncio.gather(score_all(task, ""), score_all(task, adapter))
        return Comparison(task, base, adapted)

    began = time.monotonic()
    comparisons = await asyncio.gather(*(both(task, adapter) for task, adapter in versions))
    return list(comparisons), tokens / (time.monotonic() - began)


def _messages(example: Example) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in example.prompt]
