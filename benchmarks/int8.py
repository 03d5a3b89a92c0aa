"""What a base in 8 bits costs and saves: speed and logits beside the same base in bfloat16.

    python benchmarks/int8.py [--model DIRECTORY]

Prints a table and a last line of JSON: for each workload the median of tokens/s in both; for the
logits after each token of this page's own text, the relative error, the mean Kullback-Leibler
divergence in nats and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from in_process import Steps, answer, settings_for
from paths import Places
from peers.protocol import Batch, Spec
from rich.console import Console
from transformers import AutoTokenizer
from workloads import OUTPUT_TOKENS, WORKLOADS, adapter_folders

from manylora.demo.base import get_base
from manylora.kernels import EditTable, make_batch, make_plan, select
from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.model import AdaptedModel, load_base
from manylora.server.engine.model.step import StepInputs

SPEEDS = ("single-base", "base-32", "distinct-32")
KINDS = ("none", "int8")
REPEATS = 3
BLOCK = 16


@dataclass(slots=True)
class Drift:
    """relative_error: of all logits, by 2-norms. divergence: nats. same_token: a share of 1."""

    relative_error: float
    divergence: float
    same_token: float


async def speeds(model: Path, quantization: str, adapters: Path) -> dict[str, float]:
    """Output tokens/s of each workload."""
    folders = adapter_folders(WORKLOADS["distinct-32"].ranks, model, adapters)
    spec = Spec(str(model), str(adapters), [str(f) for f in folders], resident=len(folders))
    settings = replace(settings_for(spec), quantization=quantization)
    engine = AsyncEngine(settings, lambda digest: folders[int(digest)], Steps())
    await engine.start()
    found: dict[str, float] = {}
    try:
        for name in SPEEDS:
            workload = WORKLOADS[name]
            prompts = workload.prompts(engine.info.vocab_size)
            batch = Batch(prompts, list(workload.picks), OUTPUT_TOKENS)
            runs = [await answer(engine, batch, f"{name}-{i}") for i in range(REPEATS + 1)]
            found[name] = statistics.median(run.tokens / run.seconds for run in runs[1:])
    finally:
        await engine.stop()
    return found


@torch.inference_mode()
def logits_of(model: Path, quantization: str, ids: list[int]) -> torch.Tensor:
    """After each token: float32 [len(ids), vocab]."""
    device = torch.device("cpu")
    made = load_base(model, "bfloat16", device, select(device), quantization=quantization)
    assert isinstance(made, AdaptedModel)
    made.bind(torch.empty(0, dtype=made.dtype), EditTable(1, len(made.modules)))
    blocks = -(-len(ids) // BLOCK)
    shapes = [(blocks, heads, BLOCK, dim) for heads, dim in made.kv_layout]
    made.attach_cache(
        [(torch.zeros(s, dtype=made.dtype), torch.zeros(s, dtype=made.dtype)) for s in shapes]
    )
    count = torch.tensor([len(ids)], dtype=torch.int32).numpy()
    table = torch.arange(blocks, dtype=torch.int32)[None].numpy()
    plan = make_plan(torch.full((len(ids),), -1, dtype=torch.int32).numpy())
    rows = torch.arange(len(ids))
    return made.forward(
        StepInputs(
            torch.tensor(ids), rows, plan, plan, make_batch(count, count, table, BLOCK), rows
        )
    )


def drift(exact: torch.Tensor, other: torch.Tensor) -> Drift:
    p, q = exact.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return Drift(
        float((other - exact).norm() / exact.norm()),
        float((p.exp() * (p - q)).sum(dim=-1).mean()),
        float((exact.argmax(dim=-1) == other.argmax(dim=-1)).float().mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    places, console = Places.default(), Console()
    model = parser.parse_args().model or get_base(places.cache, console)
    ids = AutoTokenizer.from_pretrained(model).encode(__doc__ or "")
    found = drift(*(logits_of(model, kind, ids) for kind in KINDS))
    console.print(f"{len(ids)} tokens of text: {found}")
    results = {kind: asyncio.run(speeds(model, kind, places.adapters)) for kind in KINDS}
    for name in SPEEDS:
        exact, ints = (results[kind][name] for kind in KINDS)
        console.print(
            f"{name:12} bfloat16 {exact:6.1f} tokens/s, int8 {ints:6.1f}: {ints / exact:.2f}"
        )
    print(json.dumps({"drift": asdict(found), "tokens_per_second": results}))


if __name__ == "__main__":
    main()
