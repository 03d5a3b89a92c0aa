"""The gRPC server: our two services, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from manylora.adapters_store.store import Store
from manylora.errors import FailedPrecondition
from manylora.server.engine.front import AsyncEngine
from manylora.server.rpc.adapters import AdapterService
from manylora.server.rpc.gate import Gate
from manylora.server.rpc.inference import InferenceService
from manylora.v1 import adapters_pb2_grpc, inference_pb2_grpc
from manylora.v1.adapters_pb2 import DESCRIPTOR as ADAPTERS
from manylora.v1.inference_pb2 import DESCRIPTOR as INFERENCE

MAX_MESSAGE_BYTES = 4 << 20  # received: one prompt, or one chunk of an upload
HEALTH_SECONDS = 1.0  # for telling those who watch the health that it ends
MAX_STREAMS = 4096  # calls at once on one connection
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error
    # find dead clients: ping after a minute of silence, wait 20 s for the answer
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # clients that ping more often than every 10 s, beyond two strikes, are cut off
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.keepalive_permit_without_calls", 1),
)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = tuple(
    service.full_name
    for file in (INFERENCE, ADAPTERS)
    for service in file.services_by_name.values()
)


class RpcServer:
    """Serves one engine and one store. Lives on the engine's asyncio loop.

    Args:
        engine: started, and stopped after this, by the caller.
        store: where adapters are kept.
        host, port: where to listen; port 0: any free one.
        import_roots: directories that ImportAdapter may read below.

    Raises:
        FailedPrecondition: the address cannot be listened on.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        store: Store,
        *,
        host: str,
        port: int,
        import_roots: Sequence[Path] = (),
    ) -> None:
        self._gate = Gate()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(interceptors=(self._gate,), options=OPTIONS)
        inference = InferenceService(engine, store)
        adapters = AdapterService(engine, store, import_roots)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)  # type: ignore[no-untyped-call]
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = self._listen(host, port)

    def _listen(self, host: str, port: int) -> int:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return int(self._server.add_insecure_port(address))
        except RuntimeError as error:
            raise FailedPrecondition(
                "cannot listen here", field="port", found=address, wanted="a free port"
            ) from error

    async def start(self) -> None:
        for service in SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def drain(self, seconds: float) -> None:
        """Health turns NOT_SERVING, new calls and watchers get UNAVAILABLE, running ones may
        finish within `seconds`."""
        await asyncio.gather(self._tell_health(), self._gate.drain(seconds))

    async def _tell_health(self) -> None:
        """In time, even if one who watches a service's health does not read."""
        ends = [self._health.set(name, NOT_SERVING) for name in ("", *SERVICES)]
        for end in (asyncio.gather(*ends), self._health.enter_graceful_shutdown()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(end, HEALTH_SECONDS)

    async def stop(self) -> None:
        """Ends at once; what still runs gets UNAVAILABLE."""
        await self._gate.drain(0)
        await self._server.stop(0)
