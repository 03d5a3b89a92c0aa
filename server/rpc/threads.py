"""Blocking work of a call, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")


class Threads:
    """Threads for one kind of work, so that however slow it is, no other kind waits for it."""

    def __init__(self, count: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Runs `work` in a thread. A caller that is cancelled leaves only when the thread is done,
        so that nothing is cleared up under its hands."""
        task = asyncio.get_running_loop().run_in_executor(self._executor, work)
        cancelled = False
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            task.exception()  # seen: nobody is left to tell
            raise asyncio.CancelledError
        return task.result()
