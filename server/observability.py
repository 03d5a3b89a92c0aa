"""What the server tells Prometheus, and how it logs.

Per-adapter counters have a bounded label set: the first `adapter_limit` adapters seen get labels
of their own ("tenant/adapter", all versions together), requests without an adapter count as
"base", those on several together as "composition", and every later adapter as "other".
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from manylora.server.engine.types import (
    AdapterKey,
    EngineStats,
    ModelInfo,
    RequestRecord,
    Residency,
    ResidencyState,
    StepRecord,
)

BASE = "base"
COMPOSITION = "composition"
OTHER = "other"

_WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_TIMES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_STEP_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SIZES = tuple(float(1 << power) for power in range(14))


class PrometheusObserver:
    """The engine's Observer (server/engine/types.py), kept as Prometheus metrics.

    Called on the engine's thread; scraped from others (the client library locks each value).
    """

    def __init__(self, adapter_limit: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._labels = BoundedLabels(adapter_limit)
        self._states: dict[AdapterKey, ResidencyState] = {}
        self._make_request_metrics()
        self._make_step_metrics()
        self._make_adapter_metrics()

    def watch(self, info: ModelInfo, stats: Callable[[], EngineStats]) -> None:
        """Publish which model runs, and the engine's state at every scrape."""
        labels = ("model", "architecture", "dtype", "device", "kernels")
        values = (info.name, info.architecture, info.dtype, info.device, info.kernels)
        gauge = Gauge(
            "manylora_model_info", "The base model, as labels.", labels, registry=self.registry
        )
        gauge.labels(*values).set(1)
        self.registry.register(StatsCollector(stats))

    def on_step(self, record: StepRecord) -> None:
        self._step_seconds.observe(record.seconds)
        self._step_rows.observe(record.rows)
        self._step_sequences.observe(record.sequences)

    def on_request(self, record: RequestRecord) -> None:
        usage = record.usage
        self._requests.labels(record.outcome).inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        self._generated_tokens.inc(usage.completion_tokens)
        if usage.cached_tokens:
            self._prefix_hits.inc()
        self._queue_seconds.observe(record.queue_seconds)
        if record.first_token_seconds is not None:
            self._first_token.observe(record.first_token_seconds)
        if record.per_token_seconds is not None:
            self._per_token.observe(record.per_token_seconds)
        label = self._labels.of(record.adapter)
        self._adapter_requests.labels(label).inc()
        self._adapter_prompt_tokens.labels(label).inc(usage.prompt_tokens)
        self._adapter_generated_tokens.labels(label).inc(usage.completion_tokens)

    def on_residency(self, event: Residency) -> None:
        key, state = event.key, event.state
        before = self._states.pop(key, None)
        if state in (ResidencyState.LOADING, ResidencyState.RESIDENT):
            self._states[key] = state
        match before, state:
            case ResidencyState.LOADING, ResidencyState.RESIDENT:
                self._loads.inc()
                self._load_seconds.observe(event.load_seconds)
            case ResidencyState.LOADING, ResidencyState.FAILED:
                self._load_failures.inc()
            case ResidencyState.RESIDENT, ResidencyState.EVICTED:
                self._evictions.inc()

    def _make_request_metrics(self) -> None:
        self._requests = self._counter(
            "manylora_requests_total", "Finished requests, by how they ended.", ("outcome",)
        )
        self._prompt_tokens = self._counter(
            "manylora_prompt_tokens_total", "Tokens in prompts, cached ones included."
        )
        self._cached_tokens = self._counter(
            "manylora_cached_prompt_tokens_total", "Prompt tokens taken from the prefix cache."
        )
        self._prefix_hits = self._counter(
            "manylora_prefix_cache_hits_total", "Requests that found a beginning in the cache."
        )
        self._generated_tokens = self._counter(
            "manylora_generated_tokens_total", "Tokens generated."
        )
        self._queue_seconds = self._histogram(
            "manylora_queue_seconds", "Time from arrival to the first step.", _WAITS
        )
        self._first_token = self._histogram(
            "manylora_time_to_first_token_seconds", "Time from arrival to the first token.", _WAITS
        )
        self._per_token = self._histogram(
            "manylora_time_per_output_token_seconds",
            "Mean time per token of a request, after its first.",
            _TOKEN_TIMES,
        )

    def _make_step_metrics(self) -> None:
        self._step_seconds = self._histogram(
            "manylora_step_seconds", "Time of one forward pass.", _STEP_TIMES
        )
        self._step_rows = self._histogram("manylora_step_rows", "Tokens in a step.", _SIZES)
        self._step_sequences = self._histogram(
            "manylora_step_sequences", "Requests in a step.", _SIZES[:11]
        )

    def _make_adapter_metrics(self) -> None:
        label = ("adapter",)
        self._adapter_requests = self._counter(
            "manylora_adapter_requests_total", "Finished requests, by adapter.", label
        )
        self._adapter_prompt_tokens = self._counter(
            "manylora_adapter_prompt_tokens_total", "Tokens in prompts, by adapter.", label
        )
        self._adapter_generated_tokens = self._counter(
            "manylora_adapter_generated_tokens_total", "Tokens generated, by adapter.", label
        )
        self._loads = self._counter("manylora_adapter_loads_total", "Adapters made resident.")
        self._evictions = self._counter(
            "manylora_adapter_evictions_total", "Adapters that left the device."
        )
        self._load_failures = self._counter(
            "manylora_adapter_load_failures_total", "Adapters that could not be made resident."
        )
        self._load_seconds = self._histogram(
            "manylora_adapter_load_seconds", "Time to fetch, check, lower and pack one.", _WAITS
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


_STATS = (
    ("waiting", "manylora_waiting_requests", "Requests in the queue."),
    ("running", "manylora_running_requests", "Requests with KV blocks."),
    ("blocks_total", "manylora_kv_blocks", "Blocks of the KV cache."),
    ("blocks_free", "manylora_kv_free_blocks", "Blocks that no request holds."),
    ("pool_bytes", "manylora_adapter_pool_bytes", "Size of the adapter pool."),
    ("pool_bytes_used", "manylora_adapter_pool_used_bytes", "Bytes of resident adapters."),
    ("slots_total", "manylora_adapter_slots", "Adapters that can be resident at once."),
    ("slots_used", "manylora_adapter_used_slots", "Adapters that are resident."),
)


class StatsCollector(Collector):
    """Reads the engine's snapshot when Prometheus asks, so that no step pays for it."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field, name, text in _STATS:
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))


class BoundedLabels:
    """Adapter labels: the first `limit` seen keep their own, the rest share one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def of(self, adapter: AdapterKey | None) -> str:
        if adapter is None:
            return BASE
        if adapter.parts:
            return COMPOSITION
        name = adapter.label.partition("@")[0]
        if name in self._seen:
            return name
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(name)
        return name


class KeyValueFormatter(logging.Formatter):
    """One line a record: `time=… level=… logger=… message="…"` and each `extra` as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        words = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        words |= {k: v for k, v in vars(record).items() if k not in _RECORD_FIELDS}
        if record.exc_info:
            words["error"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={_quoted(str(value))}" for key, value in words.items())


_RECORD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def setup_logging(level: str) -> None:
    """Send every logger's records of `level` and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _quoted(text: str) -> str:
    plain = text and text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)
