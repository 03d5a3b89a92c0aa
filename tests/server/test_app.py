"""The whole process: it serves, counts, drains and stops."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from manylora_testing.models import tiny_model
from manylora_testing.serve_process import ServeProcess
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from prometheus_client.parser import text_string_to_metric_families

from manylora.client import Chunk, Client
from manylora.errors import Unavailable

CONTEXT = 8192
FLAGS = ("--dtype", "float32", "--kv-cache-bytes", "64MiB", "--adapter-bytes", "8MiB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_model(
        "qwen3",
        tmp_path_factory.mktemp("base"),
        vocab_size=TOKENIZER_VOCAB,
        max_position_embeddings=CONTEXT,
    )
    return tiny_tokenizer(directory)


def _health(server: ServeProcess) -> int:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status


def _endless(client: Client, max_tokens: int) -> Iterator[Chunk]:
    stream = client.stream(token_ids=[5, 6, 7], max_tokens=max_tokens, ignore_eos=True)
    next(stream)
    return stream


def _wait_for_drain(server: ServeProcess) -> None:
    while server.get("/readyz")[0] == 200:
        assert server.process.poll() is None


def _check_counts(server: ServeProcess, client: Client) -> None:
    """Of a server that has served nothing yet."""
    for _ in range(2):
        client.generate(token_ids=[5] * 40, max_tokens=4, ignore_eos=True)
    text = server.get("/metrics")[1]
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["manylora_requests_total", "length"] == 2
    assert values["manylora_prompt_tokens_total",] == 80
    assert values["manylora_cached_prompt_tokens_total",] == 32
    assert values["manylora_generated_tokens_total",] == 8
    assert values["manylora_adapter_requests_total", "base"] == 2
    assert values["manylora_time_to_first_token_seconds_count",] == 2
    assert values["manylora_step_rows_sum",] == 40 + 8 + 3 + 3
    assert values["manylora_running_requests",] == 0
    assert values["manylora_kv_blocks",] == values["manylora_kv_free_blocks",] > 0


def test_serves_counts_and_drains_on_sigterm(model: Path, tmp_path: Path) -> None:
    with ServeProcess.start(tmp_path, model, FLAGS) as server, Client(server.grpc) as client:
        assert server.get("/readyz")[0] == 200
        assert _health(server) == health_pb2.HealthCheckResponse.SERVING
        _check_counts(server, client)
        stream = _endless(client, 600)
        server.signal(signal.SIGTERM)
        _wait_for_drain(server)
        assert server.get("/healthz")[0] == 200
        assert _health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="draining"):
            client.generate(token_ids=[5])
        last = list(stream)[-1]
        assert last.finish_reason == "length"
        assert last.usage is not None
        assert last.usage.completion_tokens == 600
        assert server.wait() == 0
    log = server.log.read_text()
    assert "message=stopping signal=SIGTERM" in log
    assert "Traceback" not in log


def test_second_signal_stops_at_once(model: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--drain-seconds", "100000")
    with ServeProcess.start(tmp_path, model, flags) as server, Client(server.grpc) as client:
        stream = _endless(client, CONTEXT - 3)
        server.signal(signal.SIGINT)
        _wait_for_drain(server)
        server.signal(signal.SIGINT)
        with pytest.raises(Unavailable):
            list(stream)
        assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


def test_drain_has_a_limit(model: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--drain-seconds", "0.1")
    with ServeProcess.start(tmp_path, model, flags) as server, Client(server.grpc) as client:
        stream = _endless(client, CONTEXT - 3)
        server.signal(signal.SIGTERM)
        with pytest.raises(Unavailable):
            list(stream)
        assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()
