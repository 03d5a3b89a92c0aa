"""Metrics, their endpoint, and log lines."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from manylora.errors import FailedPrecondition
from manylora.server.engine.types import (
    AdapterKey,
    EngineStats,
    ModelInfo,
    RequestRecord,
    Residency,
    ResidencyState,
    StepRecord,
    Usage,
    WeightedPart,
)
from manylora.server.http.endpoint import HttpEndpoint
from manylora.server.observability import KeyValueFormatter, PrometheusObserver
from manylora.server.rpc.resolve import composition_key

STATS = EngineStats(
    waiting=1,
    running=2,
    blocks_total=100,
    blocks_free=60,
    pool_bytes=4096,
    pool_bytes_used=1024,
    slots_total=8,
    slots_used=3,
)
INFO = ModelInfo(
    "base", "LlamaForCausalLM", "float32", "cpu", "cpu/avx2", 128, 256, 14, True, (), token_types=0
)


def _key(name: str, version: int = 1) -> AdapterKey:
    return AdapterKey(digest=f"{name}-{version}", label=f"{name}@{version}")


def _request(adapter: AdapterKey | None, outcome: str = "stop") -> RequestRecord:
    return RequestRecord(adapter, outcome, Usage(10, 4, 5), 0.02, 0.2, 0.01)


def _value(observer: PrometheusObserver, name: str, **labels: str) -> float | None:
    return observer.registry.get_sample_value(name, labels)


def test_requests_and_tokens() -> None:
    observer = PrometheusObserver(adapter_limit=8)
    observer.on_request(_request(None))
    observer.on_request(_request(_key("t/a")))
    observer.on_request(RequestRecord(_key("t/a", 2), "cancelled", Usage(7, 0, 0), 0.5, None, None))
    assert _value(observer, "manylora_requests_total", outcome="stop") == 2
    assert _value(observer, "manylora_requests_total", outcome="cancelled") == 1
    assert _value(observer, "manylora_prompt_tokens_total") == 27
    assert _value(observer, "manylora_cached_prompt_tokens_total") == 8
    assert _value(observer, "manylora_prefix_cache_hits_total") == 2
    assert _value(observer, "manylora_generated_tokens_total") == 10
    assert _value(observer, "manylora_queue_seconds_sum") == pytest.approx(0.54)
    assert _value(observer, "manylora_time_to_first_token_seconds_count") == 2
    assert _value(observer, "manylora_time_per_output_token_seconds_count") == 2
    assert _value(observer, "manylora_adapter_requests_total", adapter="t/a") == 2
    assert _value(observer, "manylora_adapter_prompt_tokens_total", adapter="t/a") == 17
    assert _value(observer, "manylora_adapter_generated_tokens_total", adapter="base") == 5


def test_adapter_labels_are_bounded() -> None:
    observer = PrometheusObserver(adapter_limit=2)
    for number in range(5):
        observer.on_request(_request(_key(f"t/{number}")))
    observer.on_request(_request(_key("t/1", version=9)))
    both = tuple(WeightedPart(f"t/{i}-1", f"t/{i}@1", 0.5) for i in range(2))
    observer.on_request(_request(composition_key(both)))
    counts = {
        sample.labels["adapter"]: sample.value
        for family in observer.registry.collect()
        for sample in family.samples
        if sample.name == "manylora_adapter_requests_total"
    }
    assert counts == {"t/0": 1, "t/1": 2, "other": 3, "composition": 1}


def test_steps() -> None:
    observer = PrometheusObserver(adapter_limit=0)
    observer.on_step(StepRecord(0.25, 40, 3, STATS))
    observer.on_step(StepRecord(0.5, 3, 3, STATS))
    assert _value(observer, "manylora_step_seconds_sum") == 0.75
    assert _value(observer, "manylora_step_rows_sum") == 43
    assert _value(observer, "manylora_step_rows_bucket", le="4.0") == 1
    assert _value(observer, "manylora_step_sequences_count") == 2


def _residency(observer: PrometheusObserver, *states: ResidencyState) -> None:
    for state in states:
        observer.on_residency(Residency(_key("t/a"), state, load_seconds=0.5))


def test_loads_evictions_and_failures() -> None:
    loading, resident, evicted, failed = ResidencyState
    observer = PrometheusObserver(adapter_limit=0)
    _residency(observer, loading, resident, resident, evicted)  # the second: pinned later
    _residency(observer, loading, resident)
    _residency(observer, evicted, loading, failed, evicted)  # a failed one was never there
    _residency(observer, loading, evicted)  # nobody wanted it any more
    assert _value(observer, "manylora_adapter_loads_total") == 2
    assert _value(observer, "manylora_adapter_load_seconds_sum") == 1.0
    assert _value(observer, "manylora_adapter_evictions_total") == 2
    assert _value(observer, "manylora_adapter_load_failures_total") == 1


def test_engine_state_is_read_at_the_scrape() -> None:
    now = [STATS]
    observer = PrometheusObserver(adapter_limit=0)
    observer.watch(INFO, lambda: now[0])
    assert _value(observer, "manylora_kv_free_blocks") == 60
    now[0] = EngineStats(0, 0, 100, 100, 4096, 0, 8, 0)
    assert _value(observer, "manylora_kv_free_blocks") == 100
    assert _value(observer, "manylora_adapter_pool_used_bytes") == 0
    labels = {
        "model": "base",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "kernels": "cpu/avx2",
    }
    assert _value(observer, "manylora_model_info", **labels) == 1


@contextmanager
def _endpoint(registry: CollectorRegistry, ready: list[bool]) -> Iterator[HttpEndpoint]:
    endpoint = HttpEndpoint("127.0.0.1", 0, registry, lambda: ready[0])
    endpoint.start()
    try:
        yield endpoint
    finally:
        endpoint.stop()


def _get(endpoint: HttpEndpoint, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_endpoint() -> None:
    observer = PrometheusObserver(adapter_limit=4)
    observer.on_request(_request(_key('t/"odd\\name\n')))
    ready = [False]
    with _endpoint(observer.registry, ready) as endpoint:
        assert _get(endpoint, "/healthz")[0] == 200
        assert _get(endpoint, "/readyz")[0] == 503
        ready[0] = True
        assert _get(endpoint, "/readyz")[0] == 200
        assert _get(endpoint, "/elsewhere")[0] == 404
        status, text = _get(endpoint, "/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    labels = [s.labels["adapter"] for s in families["manylora_adapter_requests"].samples]
    assert 't/"odd\\name\n' in labels
    for family in families.values():
        assert family.documentation
        assert family.name.startswith(("manylora_", "process_"))


def test_endpoint_says_when_its_port_is_taken() -> None:
    with (
        _endpoint(CollectorRegistry(), [True]) as endpoint,
        pytest.raises(FailedPrecondition) as caught,
    ):
        HttpEndpoint("127.0.0.1", endpoint.port, CollectorRegistry(), lambda: True)
    assert caught.value.field == "http_port"
    assert str(endpoint.port) in str(caught.value)


def test_log_lines_are_key_value() -> None:
    record = logging.makeLogRecord(
        {"name": "manylora.x", "levelname": "INFO", "msg": "load %s", "args": ("done",)}
        | {"adapter": "t/a@1", "seconds": 0.5, "note": 'say "hi"\nthere', "empty": ""}
    )
    line = KeyValueFormatter().format(record)
    assert line.startswith("time=")
    assert line.endswith(
        'level=info logger=manylora.x message="load done" adapter=t/a@1 seconds=0.5 '
        r'note="say \"hi\"\nthere" empty=""'
    )
