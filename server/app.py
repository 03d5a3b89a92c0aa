"""The process: settings → store → engine → gRPC and HTTP; SIGTERM → drained → stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import threading
from contextlib import closing

from transformers.utils.logging import disable_progress_bar

from manylora.adapters_store.limits import Limits
from manylora.adapters_store.store import Store
from manylora.errors import ManyloraError
from manylora.server.config import Settings
from manylora.server.engine.front import AsyncEngine
from manylora.server.http.endpoint import HttpEndpoint
from manylora.server.observability import PrometheusObserver, setup_logging
from manylora.server.rpc.server import RpcServer

logger = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains. While the model loads, a signal ends the
    process as it would any other.

    Raises:
        FailedPrecondition: the model cannot be served, or an address cannot be listened on.
    """
    setup_logging(settings.log_level)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers' loader: it would garble the log
    observer = PrometheusObserver(settings.metric_adapters)
    ready = threading.Event()
    http = HttpEndpoint(settings.host, settings.http_port, observer.registry, ready.is_set)
    http.start()
    try:
        with closing(Store(settings.store, _limits(settings))) as store:
            engine = AsyncEngine(settings.engine(), store.open_object, observer)
            observer.watch(engine.info, engine.stats)
            asyncio.run(_serve(settings, store, engine, http, ready))
    finally:
        http.stop()


def _limits(settings: Settings) -> Limits:
    return Limits(allow_pickles=settings.allow_pickles)


async def _serve(
    settings: Settings,
    store: Store,
    engine: AsyncEngine,
    http: HttpEndpoint,
    ready: threading.Event,
) -> None:
    signals = _signals()
    await engine.start()
    try:
        server = RpcServer(
            engine,
            store,
            host=settings.host,
            port=settings.port,
            import_roots=settings.import_roots,
        )
        await server.start()
        ready.set()
        _announce(settings, engine, server, http)
        try:
            name = await _until_told(signals, engine)
            ready.clear()
            logger.info("stopping", extra={"signal": name})
            await _drain(server, settings.drain_seconds, signals)
        finally:
            ready.clear()
            await server.stop()
    finally:
        await engine.stop()
    logger.info("stopped")


async def _until_told(signals: asyncio.Queue[str], engine: AsyncEngine) -> str:
    """The signal that asks to stop. Raises ManyloraError if the engine fails: then the process
    ends, so that whoever started it can start it again."""
    told, failed = asyncio.create_task(signals.get()), asyncio.create_task(engine.failed())
    try:
        await asyncio.wait({told, failed}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            raise ManyloraError("the engine has failed; its log says why")
        return told.result()
    finally:
        told.cancel()
        failed.cancel()


async def _drain(server: RpcServer, seconds: float, signals: asyncio.Queue[str]) -> None:
    """Lets running requests end, within the time given and until a second signal."""
    drained = asyncio.create_task(server.drain(seconds))
    impatient = asyncio.create_task(signals.get())
    done, late = await asyncio.wait({drained, impatient}, return_when=asyncio.FIRST_COMPLETED)
    for task in late:
        task.cancel()
    await asyncio.gather(*done)


def _signals() -> asyncio.Queue[str]:
    """The names of the signals that ask to stop, as they come."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, queue.put_nowait, number.name)
    return queue


def _announce(
    settings: Settings, engine: AsyncEngine, server: RpcServer, http: HttpEndpoint
) -> None:
    """One line of JSON for whoever started us; standard output has nothing else."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    event = {
        "event": "ready",
        "model": engine.info.name,
        "grpc": f"{host}:{server.port}",
        "http": f"http://{host}:{http.port}",
    }
    print(json.dumps(event), flush=True)
    logger.info("serving", extra={**event, "kernels": engine.info.kernels})
