"""Where a decode step's time goes, next to what the machine's limits would allow.

    python benchmarks/steps.py [--model DIRECTORY] [--out DIRECTORY]

A step is timed from the end of the one before it. Within it, the calls that run the decoder's
layers and the head are timed where they are made; the rest is the host's. Of the layers' time:

edits            what the same rows cost more with adapters than without
attention        what they cost more after 128 tokens than after one
base products    the layers' products by themselves, less what it takes to call them, and the head
other kernels    the rest: norms, rotary embedding, cache writes, activations, short attention

The floor: the base's weights read once or its products computed, whichever takes longer, and the
adapters and the KV cache read once, at the speeds that this machine shows in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from in_process import answer, settings_for
from kernels_timing import takes_bfloat16
from paths import Places
from peers.protocol import Batch, Spec
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from workloads import WORKLOADS, Workload, adapter_folders, kv_bytes

from manylora.demo.base import get_base
from manylora.kernels import cpu
from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.model.fuse import FusedLayer
from manylora.server.engine.model.projection import FusedHead
from manylora.server.engine.types import RequestRecord, Residency, StepRecord

CASES = tuple(
    (rows, adapters) for rows in (1, 8, 32, 64) for adapters in (0, 1, 8, 32) if adapters <= rows
)
STEPS = 24  # counted, of each case
PARTS = ("base products", "edits", "attention", "other kernels", "host")


@dataclass(slots=True)
class Parts:
    """Seconds of one decode step of `rows` sequences on `adapters` adapters of rank 16."""

    rows: int
    adapters: int
    step: float
    floor: float
    parts: dict[str, float]


@dataclass(slots=True)
class Timed:
    """Medians of one case's steps: all of it, the call for the layers, the head."""

    step: float
    layers: float
    head: float


class Clock:
    """An observer that knows what each step's layers and head took. Patches the calls that make
    them; all run on the engine's thread."""

    def __init__(self) -> None:
        self.layers = self.head = self.ended = 0.0
        self.steps: list[tuple[int, Timed]] = []
        self._time(cpu.DecoderLayers, "run_", "layers")
        self._time(FusedHead, "product", "head")

    def on_step(self, record: StepRecord) -> None:
        now = time.perf_counter()
        self.steps.append((record.rows, Timed(now - self.ended, self.layers, self.head)))
        self.ended = now
        self.layers = self.head = 0.0

    def on_request(self, record: RequestRecord) -> None:
        pass

    def on_residency(self, event: Residency) -> None:
        pass

    def median(self, rows: int) -> Timed:
        found = [timed for count, timed in self.steps if count == rows]
        self.steps.clear()
        return Timed(
            *(statistics.median(getattr(t, name) for t in found) for name in Timed.__slots__)
        )

    def _time(self, owner: type, method: str, part: str) -> None:
        original: Callable[..., object] = getattr(owner, method)

        def timed(*arguments: object) -> object:
            begin = time.perf_counter()
            result = original(*arguments)
            setattr(self, part, getattr(self, part) + time.perf_counter() - begin)
            return result

        setattr(owner, method, timed)


@dataclass(slots=True)
class Machine:
    """bytes/s read from memory; operations/s, in bfloat16 or, where oneDNN has no such product, in
    float32."""

    reads: float
    computes: float

    @classmethod
    def measure(cls) -> Machine:
        block = cpu.huge_empty([64 << 20], torch.int64).fill_(1)
        x = torch.ones(2048, 2048, dtype=torch.bfloat16 if takes_bfloat16() else torch.float32)
        return cls(
            block.nbytes / best_seconds(block.sum),
            2 * 2048**3 / best_seconds(lambda: F.linear(x, x)),
        )

    def better(self, other: Machine) -> Machine:
        """What two measurements show that the machine can do."""
        return Machine(max(self.reads, other.reads), max(self.computes, other.computes))


def best_seconds(call: Callable[[], object], times: int = 12) -> float:
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found)


class Bench:
    def __init__(self, model: Path, adapters: Path) -> None:
        folders = adapter_folders(WORKLOADS["distinct-32"].ranks, model, adapters)
        spec = Spec(str(model), str(adapters), [str(f) for f in folders], resident=32, sequences=64)
        self.clock = Clock()
        self.engine = AsyncEngine(
            settings_for(spec), lambda digest: folders[int(digest)], self.clock
        )
        self.batches = 0
        self.model_path = model
        self.weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        self.adapter = (folders[0] / "adapter_model.safetensors").stat().st_size
        self.machine = Machine.measure()

    async def run(self, rows: int, adapters: int, prompt_tokens: int = 128) -> Timed:
        """Decode steps of `rows` requests at once."""
        self.batches += 1
        prompts = Workload("", rows, (), ()).prompts(self.engine.info.vocab_size)
        picks = [i % adapters if adapters else -1 for i in range(rows)]
        batch = Batch([prompt[:prompt_tokens] for prompt in prompts], picks, STEPS + 4)
        self.clock.steps.clear()
        await answer(self.engine, batch, str(self.batches))
        return self.clock.median(rows)

    def products(self, rows: int) -> float:
        """Seconds of the layers' base products for so many rows, called one by one, less what the
        calls themselves take."""
        model = self.engine._engine.model.model
        layers = [m for m in model.modules() if isinstance(m, FusedLayer)]
        products = [p.product for layer in layers for p in layer.projections]
        inputs = {p.in_size: torch.randn(rows, p.in_size).bfloat16() for p in products}
        # next to no work, but enough to wake all threads
        tiny = cpu.PackedWeight(torch.ones(1024, 32).bfloat16(), cpu.HugeArena())
        x = torch.ones(1, 32).bfloat16()

        def walk() -> None:
            for product in products:
                product(inputs[product.in_size])

        def call() -> None:
            for _ in products:
                cpu.linear(x, tiny, None)

        with torch.inference_mode():
            return best_seconds(walk, 30) - best_seconds(call, 30)

    def floor(self, rows: int, adapters: int) -> float:
        operations = 2 * (self.weights / 2) * rows
        cache = kv_bytes(self.model_path, rows * (128 + STEPS // 2))
        base = max(self.weights / self.machine.reads, operations / self.machine.computes)
        return base + (adapters * self.adapter + cache) / self.machine.reads


async def measure(bench: Bench) -> list[Parts]:
    await bench.engine.start()
    try:
        await bench.run(64, 32)
        bench.machine = bench.machine.better(Machine.measure())
        found = []
        for rows in dict.fromkeys(rows for rows, _ in CASES):
            short = await bench.run(rows, 0, prompt_tokens=1)
            plain = await bench.run(rows, 0)
            products = bench.products(rows)
            for adapters in (a for r, a in CASES if r == rows):
                timed = await bench.run(rows, adapters) if adapters else plain
                floor = bench.floor(rows, adapters)
                found.append(split(rows, adapters, timed, plain, short, products, floor))
        return found
    finally:
        await bench.engine.stop()


def split(
    rows: int,
    adapters: int,
    timed: Timed,
    plain: Timed,
    short: Timed,
    products: float,
    floor: float,
) -> Parts:
    """plain: the same rows without adapters; short: that, after one token. products: seconds of
    the layers' products. No part is negative, whatever noise there is."""
    edits = max(0.0, timed.layers - plain.layers)
    attention = max(0.0, plain.layers - short.layers)
    products = min(products, plain.layers - attention)
    other = plain.layers - attention - products
    host = max(0.0, timed.step - timed.layers - timed.head)
    values = (products + timed.head, edits, attention, other, host)
    return Parts(rows, adapters, timed.step, floor, dict(zip(PARTS, values, strict=True)))


def table(found: list[Parts], machine: Machine) -> Table:
    title = (
        f"decode step, ms; memory {machine.reads / 1e9:.1f} GB/s,"
        f" products {machine.computes / 1e9:.0f} GFLOP/s"
    )
    result = Table("rows", "adapters", "step", *PARTS, "floor", "step / floor", title=title)
    for p in found:
        times = (p.step, *p.parts.values(), p.floor)
        cells = [f"{seconds * 1e3:.1f}" for seconds in times]
        result.add_row(str(p.rows), str(p.adapters), *cells, f"{p.step / p.floor:.2f}")
    return result


def plot(found: list[Parts], file: Path) -> None:
    """Stacked parts of each case, and its floor as a line across."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(found))
    bottom = [0.0] * len(found)
    for part in PARTS:
        heights = [p.parts[part] * 1e3 for p in found]
        axes.bar(places, heights, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    floors = [p.floor * 1e3 for p in found]
    axes.hlines(floors, [i - 0.45 for i in places], [i + 0.45 for i in places], "black")
    axes.plot([], [], color="black", label="floor")
    axes.set_xticks(places, [f"{p.rows}\n{p.adapters}" for p in found])
    axes.set_xlabel("rows\nadapters of rank 16")
    axes.set_ylabel("decode step, ms")
    axes.legend(fontsize=8)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path(), help="where steps.jsonl and .svg go")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    places = Places.default()
    model = options.model or get_base(places.cache, Console(stderr=True))
    bench = Bench(model, places.adapters)
    found = asyncio.run(measure(bench))
    (options.out / "steps.jsonl").write_text("".join(f"{json.dumps(asdict(p))}\n" for p in found))
    plot(found, options.out / "steps.svg")
    shown = table(found, bench.machine)
    Console(width=120).print(shown)
    shown.box = MARKDOWN
    with (options.out / "steps.md").open("w") as file:
        Console(file=file, width=120).print(shown)


if __name__ == "__main__":
    main()
