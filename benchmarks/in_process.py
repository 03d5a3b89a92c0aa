"""The engine in this process, no network: as a contender, or by `run` from other scripts."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.protocol import Batch, Outcome, Run, Spec, serve
from streams import read_together
from workloads import OUTPUT_TOKENS, Workload, kv_bytes, pool_bytes
from workloads import adapter_folders as folders_of

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
    return folders_of(workload.ranks, model, scratch)


def settings_for(spec: Spec) -> EngineSettings:
    """The engine that a spec asks for, memory and all."""
    folders = [Path(adapter) for adapter in spec.adapters]
    model = Path(spec.model)
    return EngineSettings(
        model=model,
        prefix_cache=False,
        max_sequences=spec.sequences,
        kv_cache_bytes=kv_bytes(model, spec.sequences * spec.context),
        adapter_bytes=pool_bytes(folders, spec.resident),
        max_adapters=max(1, spec.resident),
    )


async def answer(engine: AsyncEngine, batch: Batch, name: str) -> Outcome:
    """All of a batch at once. name: of this batch among the engine's."""

    async def ask(i: int) -> AsyncIterator[list[int]]:
        pick = batch.picks[i]
        request = Request(
            id=f"{name}-{i}",
            prompt=batch.prompts[i],
            sampling=SamplingParams(max_tokens=batch.output_tokens, ignore_eos=True),
            adapter=None if pick < 0 else AdapterKey(str(pick), f"bench/a{pick}@1"),
        )
        async for delta in engine.stream(request):
            yield delta.token_ids

    return await read_together([ask(i) for i in range(len(batch.prompts))])


def start(spec: Spec) -> tuple[Run, Mapping[str, Any]]:
    folders = [Path(adapter) for adapter in spec.adapters]
    engine = AsyncEngine(settings_for(spec), lambda digest: folders[int(digest)], Steps())
    loop, batches = asyncio.Runner(), 0
    loop.run(engine.start())

    def run(batch: Batch) -> Outcome:
        nonlocal batches
        batches += 1
        return loop.run(answer(engine, batch, str(batches)))

    return run, {"kernels": engine.info.kernels}


async def run(workload: Workload, model: Path, scratch: Path, repeats: int) -> list[Result]:
    """One engine, `repeats` counted runs after one that warms it up."""
    folders = adapter_folders(workload, model, scratch)
    resident = min(workload.resident, len(folders))
    spec = Spec(str(model), str(scratch), [str(folder) for folder in folders], resident=resident)
    steps = Steps()
    engine = AsyncEngine(settings_for(spec), lambda digest: folders[int(digest)], steps)
    await engine.start()
    try:
        batch = Batch(workload.prompts(engine.info.vocab_size), list(workload.picks), OUTPUT_TOKENS)
        results = []
        for repeat in range(repeats + 1):
            steps.requests.clear()
            outcome = await answer(engine, batch, str(repeat))
            results.append(_result(workload, outcome, steps.requests))
        return results[1:]
    finally:
        await engine.stop()


def _result(workload: Workload, outcome: Outcome, requests: Sequence[RequestRecord]) -> Result:
    firsts = [r.first_token_seconds for r in requests if r.first_token_seconds is not None]
    per = [r.per_token_seconds for r in requests if r.per_token_seconds is not None]
    return Result(
        workload.name,
        outcome.tokens / outcome.seconds,
        statistics.median(firsts),
        statistics.median(per),
    )


if __name__ == "__main__":
    serve(start)
