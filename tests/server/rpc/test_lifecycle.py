"""Calls that end early, servers that fill up and drain, health and reflection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from manylora_testing.served import Served, eventually, served
from manylora_testing.stubs import Stubs, explain, refusal, text_request, upload

from manylora.errors import FailedPrecondition
from manylora.server.engine.settings import EngineSettings
from manylora.server.rpc.server import RpcServer
from manylora.v1 import adapters_pb2, inference_pb2

Connect = Callable[[Served], Stubs]
ENDLESS = {"max_tokens": 4000, "ignore_eos": True}  # far more than any of these tests reads
SERVICES = ("manylora.v1.InferenceService", "manylora.v1.AdapterService")
STREAMS = 4


def test_a_cancelled_stream_frees_its_blocks(stubs: Stubs, server: Served) -> None:
    request = text_request("the printer in the hall", max_tokens=200, ignore_eos=True)
    alone = stubs.inference.Generate(request).text
    neighbour = stubs.inference.StreamGenerate(request)
    cancelled = [
        stubs.inference.StreamGenerate(text_request(f"number {i}", **ENDLESS))
        for i in range(STREAMS)
    ]
    for stream in cancelled:
        next(stream)
    assert not server.idle
    for stream in cancelled:
        stream.cancel()
    assert "".join(part.text for part in neighbour) == alone
    eventually(lambda: server.idle)


def test_a_cancelled_unary_call_frees_its_blocks(stubs: Stubs, server: Served) -> None:
    calls = [
        stubs.inference.Generate.future(text_request(f"number {i}", **ENDLESS))
        for i in range(STREAMS)
    ]
    eventually(lambda: server.engine.stats().running == STREAMS)
    for call in calls:
        call.cancel()
    eventually(lambda: server.idle)


def test_a_client_that_vanishes(server: Served, connect: Connect) -> None:
    stubs = connect(server)
    streams = [stubs.inference.StreamGenerate(text_request("x", **ENDLESS)) for _ in range(STREAMS)]
    for stream in streams:
        next(stream)
    stubs.channel.close()
    eventually(lambda: server.idle)


def test_a_client_that_does_not_read(server: Served, connect: Connect) -> None:
    """Its answers wait for it, nobody else does."""
    slow = connect(server).inference.StreamGenerate(text_request("x", **ENDLESS))
    fast = connect(server).inference.Generate(text_request("y", max_tokens=50, ignore_eos=True))
    assert len(fast.token_ids) == 50
    slow.cancel()
    eventually(lambda: server.idle)


def test_deadlines(stubs: Stubs, server: Served) -> None:
    request = text_request("hello", **ENDLESS)
    code, _ = refusal(lambda: list(stubs.inference.StreamGenerate(request, timeout=0.1)))
    assert code == "DEADLINE_EXCEEDED"
    code, _ = refusal(lambda: stubs.inference.Generate(request, timeout=0.1))
    assert code == "DEADLINE_EXCEEDED"
    eventually(lambda: server.idle)


def staged(server: Served) -> list[Path]:
    return list(server.root.glob("staging/*"))


@pytest.mark.parametrize("whole", [False, True], ids=["in the middle", "before its end"])
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_client_that_vanishes_while_it_uploads(
    server: Served,
    stubs: Stubs,
    connect: Connect,
    tenant: str,
    adapter_dirs: list[Path],
    whole: bool,
    how: str,
) -> None:
    messages = list(upload(f"tenants/{tenant}", "a", adapter_dirs[0], chunk_bytes=4096))
    messages = messages if whole else messages[:-1]
    for _ in range(10):
        leaving = connect(server)
        gone = threading.Event()

        def send(gone: threading.Event = gone) -> Iterator[adapters_pb2.PublishAdapterRequest]:
            yield from messages
            gone.wait()

        call = leaving.adapters.PublishAdapter.future(send())
        eventually(lambda: any((path / "adapter_config.json").exists() for path in staged(server)))
        if how == "cancel":
            call.cancel()
        else:
            leaving.channel.close()
        gone.set()
        eventually(lambda: not staged(server))
    listed = adapters_pb2.ListAdaptersRequest(parent=f"tenants/{tenant}")
    assert not stubs.adapters.ListAdapters(listed).adapters


def test_a_full_queue(settings: EngineSettings, tmp_path: Path, connect: Connect) -> None:
    small = replace(settings, max_sequences=1, max_waiting=1)
    with served(small, tmp_path) as running:
        stubs = connect(running)
        streams = [stubs.inference.StreamGenerate(text_request("x", **ENDLESS))]
        next(streams[0])
        streams.append(stubs.inference.StreamGenerate(text_request("x", **ENDLESS)))
        eventually(lambda: running.engine.stats().waiting == 1)
        request = text_request("y", max_tokens=1)
        code, details = refusal(lambda: stubs.inference.Generate(request))
        assert code == "RESOURCE_EXHAUSTED"
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        for stream in streams:
            stream.cancel()
        eventually(lambda: running.idle)
        assert stubs.inference.Generate(request).usage.completion_tokens == 1


def test_callers_who_stop_waiting_for_a_load(
    settings: EngineSettings, tmp_path: Path, connect: Connect, adapter_dirs: list[Path]
) -> None:
    hold = threading.Event()
    with served(settings, tmp_path, hold_loads=hold) as running:
        stubs = connect(running)
        stubs.publish("tenants/t", "a", adapter_dirs[0])
        load = adapters_pb2.LoadAdapterRequest(name="tenants/t/adapters/a")
        call = stubs.adapters.LoadAdapter.future(load)
        stream = stubs.inference.StreamGenerate(text_request("x", "t/a", **ENDLESS))
        eventually(lambda: running.engine.stats().waiting == 1)
        assert refusal(lambda: stubs.adapters.LoadAdapter(load, timeout=0.1))[0] == (
            "DEADLINE_EXCEEDED"
        )
        call.cancel()
        stream.cancel()
        eventually(lambda: running.idle)
        base = stubs.inference.Generate(text_request("x", max_tokens=3, ignore_eos=True))
        assert base.usage.completion_tokens == 3, "the base serves while adapters load"
        hold.set()
        assert stubs.adapters.LoadAdapter(load).state == adapters_pb2.RESIDENCY_STATE_RESIDENT
        assert stubs.inference.Generate(text_request("x", "t/a", max_tokens=1)).adapter == "t/a@1"


def health(stubs: Stubs, service: str) -> str:
    stub: Any = health_pb2_grpc.HealthStub(stubs.channel)  # type: ignore[no-untyped-call]
    status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def test_draining(
    settings: EngineSettings, tmp_path: Path, connect: Connect, adapter_dirs: list[Path]
) -> None:
    with served(settings, tmp_path) as running, ThreadPoolExecutor(1) as pool:
        stubs = connect(running)
        stubs.publish("tenants/t", "a", adapter_dirs[0])
        request = text_request("hello", "t/a", max_tokens=300, ignore_eos=True)
        whole = stubs.inference.Generate(request).text
        watch = stubs.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
        next(watch)
        stream = stubs.inference.StreamGenerate(request)
        parts = [next(stream)]
        drained: Future[None] = pool.submit(running.run, running.server.drain(60))
        code, _ = refusal(lambda: list(watch))
        assert code == "UNAVAILABLE"
        assert {health(stubs, service) for service in ("", *SERVICES)} == {"NOT_SERVING"}
        for call in (
            lambda: stubs.inference.GetModelInfo(inference_pb2.GetModelInfoRequest()),
            lambda: list(stubs.inference.StreamGenerate(request)),
            lambda: stubs.publish("tenants/t", "b", adapter_dirs[1]),
        ):
            code, details = refusal(call)
            assert code == "UNAVAILABLE" and details["ErrorInfo"].reason == "UNAVAILABLE"
        parts += stream
        assert "".join(part.text for part in parts) == whole
        drained.result()
        assert running.idle


def test_draining_has_an_end(settings: EngineSettings, tmp_path: Path, connect: Connect) -> None:
    with served(settings, tmp_path) as running:
        stubs = connect(running)
        stream = stubs.inference.StreamGenerate(text_request("hello", **ENDLESS))
        next(stream)
        running.run(running.server.drain(0.0))
        assert refusal(lambda: list(stream))[0] == "UNAVAILABLE"
        eventually(lambda: running.idle)


def test_stopping_ends_what_runs(
    settings: EngineSettings, tmp_path: Path, connect: Connect
) -> None:
    with served(settings, tmp_path) as running:
        stubs = connect(running)
        stream = stubs.inference.StreamGenerate(text_request("hello", **ENDLESS))
        next(stream)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert explain(caught.value)[0] == "UNAVAILABLE"


def test_a_port_in_use(settings: EngineSettings, tmp_path: Path) -> None:
    with served(settings, tmp_path) as running:

        async def second() -> None:
            RpcServer(running.engine, running.store, host="127.0.0.1", port=running.server.port)

        with pytest.raises(FailedPrecondition, match="port: cannot listen here"):
            running.run(second())


def test_health(stubs: Stubs) -> None:
    assert {health(stubs, service) for service in ("", *SERVICES)} == {"SERVING"}
    with pytest.raises(grpc.RpcError) as caught:
        health(stubs, "manylora.v1.Nothing")
    assert explain(caught.value)[0] == "NOT_FOUND"


def test_reflection(stubs: Stubs) -> None:
    database = ProtoReflectionDescriptorDatabase(stubs.channel)
    assert {*SERVICES, "grpc.health.v1.Health"} <= set(database.get_services())
    pool = DescriptorPool(database)
    methods = {
        service: set(pool.FindServiceByName(service).methods_by_name) for service in SERVICES
    }
    assert methods == {
        "manylora.v1.InferenceService": {
            "Generate",
            "StreamGenerate",
            "Classify",
            "ClassifyTokens",
            "Embed",
            "Tokenize",
            "GetModelInfo",
        },
        "manylora.v1.AdapterService": {
            "PublishAdapter",
            "ImportAdapter",
            "GetAdapter",
            "ListAdapters",
            "DeleteAdapter",
            "LoadAdapter",
            "UnloadAdapter",
            "WatchAdapters",
        },
    }
