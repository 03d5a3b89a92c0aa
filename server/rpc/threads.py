"""Blocking work of a call, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


async def in_thread(work: Callable[[], _Result]) -> _Result:
    """Runs `work` in a thread. A caller that is cancelled leaves only when the thread is done, so
    that nothing is cleared up under its hands."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
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
