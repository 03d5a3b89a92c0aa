"""Runs a workload through the engine in this process, no network."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from workloads import OUTPUT_TOKENS, Workload, make_adapter

from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import (
    AdapterKey,
    Request,
    RequestRecord,
    Residency,
    SamplingParams,
    StepRecord,
)


@dataclass(slots=True)
class Result:
    """tokens/s of output over the whole run; seconds to the first token (median of requests);
    seconds per token after it (median)."""

    workload: str
    tokens_per_second: float
    first_token: float
    per_token: float


class Steps:
    """An observer that keeps step and request records."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.requests: list[RequestRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def on_residency(self, event: Residency) -> None:
        pass


def adapter_folders(workload: Workload, model: Path, scratch: Path) -> list[Path]:
    """The workload's adapters, made where they are not there yet."""
    folders = [scratch / f"r{rank}-{i}" for i, rank in enumerate(workload.ranks)]
    for i, (rank, folder) in enumerate(zip(workload.ranks, folders, strict=True)):
        if not (folder / "adapter_config.json").exists():
            make_adapter(model, rank, i, folder)
    return folders


async def run(workload: Workload, model: Path, scratch: Path, repeats: int) -> list[Result]:
    """One server, `repeats` counted runs after one that warms it up."""
    folders = adapter_folders(workload, model, scratch)
    steps = Steps()
    settings = EngineSettings(
        model=model,
        prefix_cache=False,
        max_sequences=32,
        kv_cache_bytes=1 << 30,
        adapter_bytes=_pool_bytes(folders, workload.resident),
        max_adapters=max(1, min(workload.resident, len(folders))),
    )
    engine = AsyncEngine(settings, lambda digest: folders[int(digest)], steps)
    await engine.start()
    try:
        results = []
        for repeat in range(repeats + 1):
            steps.requests.clear()
            seconds = await _once(engine, workload, repeat)
            results.append(_result(workload, seconds, steps))
        return results[1:]
    finally:
        await engine.stop()


def _pool_bytes(folders: list[Path], resident: int) -> int:
    """Room for the largest `resident` adapters."""
    sizes = sorted((f / "adapter_model.safetensors").stat().st_size for f in folders)
    return int(sum(sizes[-resident:]) * 1.02) + (1 << 20)


async def _once(engine: AsyncEngine, workload: Workload, repeat: int) -> float:
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    requests = [
        Request(
            id=f"{repeat}-{i}",
            prompt=prompt,
            sampling=sampling,
            adapter=None if pick < 0 else AdapterKey(str(pick), f"bench/a{pick}@1"),
        )
        for i, (prompt, pick) in enumerate(
            zip(workload.prompts(engine.info.vocab_size), workload.picks, strict=True)
        )
    ]
    start = time.perf_counter()
    await asyncio.gather(*(_consume(engine, request) for request in requests))
    return time.perf_counter() - start


async def _consume(engine: AsyncEngine, request: Request) -> None:
    async for _ in engine.stream(request):
        pass


def _result(workload: Workload, seconds: float, steps: Steps) -> Result:
    firsts = [r.first_token_seconds for r in steps.requests if r.first_token_seconds is not None]
    per = [r.per_token_seconds for r in steps.requests if r.per_token_seconds is not None]
    return Result(
        workload.name,
        workload.requests * OUTPUT_TOKENS / seconds,
        statistics.median(firsts),
        statistics.median(per),
    )
