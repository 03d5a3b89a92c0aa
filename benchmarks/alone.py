"""What is measured without company: a server's start, its memory, and a cold adapter's price."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from pathlib import Path

from bars import COLD, OVER_GRPC, OVERHEAD_MIB, RESIDENT, START_SECONDS
from contender import ContenderError, resident_bytes
from peers.protocol import Batch, Spec
from phases import Bench, Entry, batch_of, record_of
from prometheus_client.parser import text_string_to_metric_families
from records import Figure
from workloads import WORKLOADS, kv_bytes

DISTINCT = Entry(OVER_GRPC, {"distinct-32": 1})
STARTS = 3
POOL_USED = "manylora_adapter_pool_used_bytes"
ROUNDS = 3  # of all adapters, each cold and then resident


def run_alone(bench: Bench) -> list[str]:
    """Returns what went wrong."""
    try:
        for _ in range(STARTS):
            _start_and_memory(bench)
        _cold_adapters(bench)
    except ContenderError as error:
        bench.say(f"failed: {error}")
        return [str(error)]
    return []


def _start_and_memory(bench: Bench) -> None:
    """Memory is looked at after distinct-32, when KV cache and adapters are all there."""
    spec = bench.spec(DISTINCT)
    server = bench.start(DISTINCT, spec)
    try:
        start = Figure(START_SECONDS, server.about["server_seconds"])
        server.run(batch_of(WORKLOADS["distinct-32"], bench.vocab))
        holds = accounted_bytes(spec) + adapter_bytes(server.about["metrics"])
        above = resident_bytes(server.about["server"]) - holds
    finally:
        server.stop()
    overhead = Figure(OVERHEAD_MIB, above / 2**20)
    bench.results.add(start)
    bench.results.add(overhead)
    bench.say(f"serve: start {start.value:.1f} s, {overhead.value:.0f} MiB above what it must hold")


def accounted_bytes(spec: Spec) -> int:
    """What a server must hold beside adapters: weights and KV cache."""
    model = Path(spec.model)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return weights + kv_bytes(model, spec.sequences * spec.context)


def adapter_bytes(metrics: str) -> int:
    """Of the adapters that are resident, as the server itself counts them."""
    try:
        with urllib.request.urlopen(metrics, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
    except OSError as error:
        raise ContenderError(f"no metrics: {error}") from error
    return int(next(f for f in families if f.name == POOL_USED).samples[0].value)


def _cold_adapters(bench: Bench) -> None:
    """One token of one request: on an adapter that is not resident, then on it again. There is
    memory for one adapter, so each is cold when its turn comes."""
    server = bench.start(DISTINCT, replace(bench.spec(DISTINCT), resident=1))
    prompts = WORKLOADS["single-adapter"].prompts(bench.vocab)
    try:
        server.run(Batch(prompts, [31], 8))
        for repeat in range(ROUNDS):
            for pick in range(32):
                for workload in (COLD, RESIDENT):
                    outcome = server.run(Batch(prompts, [pick], 1))
                    bench.results.add(record_of(server, workload, repeat, outcome))
    finally:
        server.stop()
