"""A real server on loopback, for tests that are its clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from manylora.adapters_store.limits import Limits
from manylora.adapters_store.store import Store
from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.settings import EngineSettings
from manylora.server.observability import PrometheusObserver
from manylora.server.rpc.server import RpcServer

PATIENCE = 60.0  # seconds until a condition that does not come is a failure

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Served:
    """What the server is made of. Its loop runs on another thread: see `run`."""

    engine: AsyncEngine
    store: Store
    root: Path  # the store's directory
    server: RpcServer
    loop: asyncio.AbstractEventLoop
    observer: PrometheusObserver

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The coroutine's result, run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    @property
    def idle(self) -> bool:
        """No request waits or runs, and every KV block is free."""
        stats = self.engine.stats()
        return not (stats.waiting or stats.running) and stats.blocks_free == stats.blocks_total


@contextmanager
def served(
    settings: EngineSettings,
    root: Path,
    *,
    limits: Limits | None = None,
    import_roots: Sequence[Path] = (),
    hold_loads: threading.Event | None = None,
) -> Iterator[Served]:
    """Serves the store in `root` from a thread until the block ends.

    hold_loads: adapters are not fetched from the store until it is set.
    """
    with closing(Store(root, limits or Limits())) as store:

        def fetch(digest: str) -> Path:
            if hold_loads is not None:
                hold_loads.wait(PATIENCE)
            return store.open_object(digest)

        observer = PrometheusObserver(100)
        engine = AsyncEngine(settings, fetch, observer)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="served")
        thread.start()
        try:
            running = _running(engine, store, import_roots)
            enter = asyncio.run_coroutine_threadsafe(running.__aenter__(), loop)
            server = enter.result(PATIENCE)
            try:
                yield Served(engine, store, root, server, loop, observer)
            finally:
                leave = running.__aexit__(None, None, None)
                asyncio.run_coroutine_threadsafe(leave, loop).result(PATIENCE)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@asynccontextmanager
async def _running(
    engine: AsyncEngine, store: Store, import_roots: Sequence[Path]
) -> AsyncIterator[RpcServer]:
    server = RpcServer(engine, store, host="127.0.0.1", port=0, import_roots=import_roots)
    await engine.start()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
        await engine.stop()


def eventually(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.002)
