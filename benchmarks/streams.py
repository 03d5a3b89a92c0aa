"""A batch as streams that are read at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from peers.protocol import Outcome


async def read_together(streams: Sequence[AsyncIterator[Sequence[int]]]) -> Outcome:
    """Reads streams of token ids to their ends; times are the reader's."""
    begin = time.perf_counter()

    async def read(stream: AsyncIterator[Sequence[int]]) -> tuple[int, float, float]:
        tokens, first, last = 0, 0.0, 0.0
        async for ids in stream:
            last = time.perf_counter() - begin
            first = first or last
            tokens += len(ids)
        return tokens, first, last

    told = await asyncio.gather(*map(read, streams))
    tokens, first, last = zip(*told, strict=True)
    return Outcome(time.perf_counter() - begin, sum(tokens), list(first), list(last))
