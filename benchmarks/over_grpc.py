"""`manylora serve` as a process of its own, asked through the Python client from this one."""

from __future__ import annotations

import asyncio
import atexit
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peers.protocol import Batch, Outcome, Run, Spec, serve
from streams import read_together
from workloads import kv_bytes, pool_bytes

from manylora.client import AsyncClient, Client
from manylora.errors import NotFound, Unavailable

STOP_SECONDS = 20


@dataclass(slots=True)
class Server:
    """metrics: where it tells them. seconds: from the process's start to health's SERVING."""

    process: subprocess.Popen[str]
    address: str
    metrics: str
    seconds: float

    def stop(self) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self.process.kill()
        self.process.communicate()


def flags(spec: Spec) -> list[str]:
    """What `manylora serve` is to be told for a spec, memory and all."""
    model, folders = Path(spec.model), [Path(adapter) for adapter in spec.adapters]
    values = {
        "model": model,
        "store": Path(spec.scratch) / "store",
        "port": 0,
        "http-port": 0,
        "max-sequences": spec.sequences,
        "kv-cache-bytes": kv_bytes(model, spec.sequences * spec.context),
        "adapter-bytes": pool_bytes(folders, spec.resident),
        "max-adapters": max(1, spec.resident),
        "log-level": "warning",
    }
    return ["--no-prefix-cache", *(f"--{name}={value}" for name, value in values.items())]


def start_server(arguments: Sequence[str]) -> Server:
    """Raises Unavailable if the process ends before it is ready."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "manylora.server.cli", "serve", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise Unavailable("the server did not start", found=f"exit code {process.wait()}")
    ready = json.loads(line)
    address = ready["grpc"]
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable("the server is not healthy", found=answer.status)
    return Server(process, address, f"{ready['http']}/metrics", time.perf_counter() - begin)


def publish(address: str, folders: Sequence[str]) -> list[str]:
    """The adapters' names in the server's store, published where they are not there yet."""
    names = [f"bench/{Path(folder).name}" for folder in folders]
    with Client(address) as client:
        for name, folder in zip(names, folders, strict=True):
            try:
                client.get(name)
            except NotFound:
                client.publish(name, folder)
    return names


async def answer(client: AsyncClient, batch: Batch, names: Sequence[str]) -> Outcome:
    """All of a batch at once, each a stream."""

    async def ask(i: int) -> AsyncIterator[tuple[int, ...]]:
        pick = batch.picks[i]
        async for chunk in client.stream(
            token_ids=batch.prompts[i],
            adapter="" if pick < 0 else names[pick],
            max_tokens=batch.output_tokens,
            temperature=0.0,
            ignore_eos=True,
        ):
            yield chunk.token_ids

    return await read_together([ask(i) for i in range(len(batch.prompts))])


def start(spec: Spec) -> tuple[Run, Mapping[str, Any]]:
    server = start_server(flags(spec))
    atexit.register(server.stop)
    names = publish(server.address, spec.adapters)
    loop = asyncio.Runner()

    async def connect() -> AsyncClient:
        return AsyncClient(server.address)

    client = loop.run(connect())

    def run(batch: Batch) -> Outcome:
        return loop.run(answer(client, batch, names))

    about = {"server": server.process.pid, "metrics": server.metrics}
    return run, {**about, "server_seconds": server.seconds}


if __name__ == "__main__":
    serve(start)
