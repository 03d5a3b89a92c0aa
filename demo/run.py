"""The demo: three adapters are trained and published; one base serves them all in one batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from manylora.client import AsyncClient, Residency
from manylora.demo import report
from manylora.demo.adapters import Trained, get_adapter, publish
from manylora.demo.asking import Answer, Comparison, compare, stream_together
from manylora.demo.base import check_given, get_base
from manylora.demo.serving import serving
from manylora.demo.settings import DemoSettings
from manylora.demo.tasks import TASKS

_STREAM_TOKENS = 64


@dataclass(slots=True, frozen=True)
class DemoResult:
    comparisons: Sequence[Comparison]  # one for each task
    loads: Sequence[Residency]
    mixed_tokens_per_second: float  # of the mixed batch that is shown
    held_out_tokens_per_second: float
    seconds: float


def run_demo(settings: DemoSettings, console: Console | None = None) -> DemoResult:
    """Runs the whole demo; what it shows goes to the console (default: stdout).

    Raises:
        MissingExtra: a package for training or for converting the base is not installed.
        Unavailable: the base cannot be fetched, or the server does not start.
    """
    began = time.monotonic()
    console = console or Console()
    settings.cache.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # transformers' own, for what takes a second
    set_verbosity_error()
    console.rule("base model")
    base = check_given(settings.base) if settings.base else get_base(settings.cache, console)
    console.print(base.name)
    console.rule("adapters")
    trained = [get_adapter(task, base, settings.cache, console) for task in TASKS]
    store = settings.cache / "store"
    versions = [publish(adapter, store) for adapter in trained]
    console.rule("server")
    with serving(base, store, settings.cache / "server.log") as address:
        return asyncio.run(_ask(address, trained, versions, console, began))


async def _ask(
    address: str,
    trained: Sequence[Trained],
    versions: Sequence[str],
    console: Console,
    began: float,
) -> DemoResult:
    async with AsyncClient(address) as client:
        info = await client.model_info()
        console.print(f"{info.name} on {address}: {info.dtype}, {info.device}, {info.kernels}")
        loads = [await client.load(version) for version in versions]
        console.print(report.adapters_table(trained, loads))
        mixed = await _show_mixed(client, versions, console)
        console.rule("held-out rows")
        comparisons, speed = await _show_scores(client, versions, console)
    seconds = time.monotonic() - began
    console.print(f"{mixed:.0f} tokens/s in the mixed batch, {speed:.0f} over the held-out rows")
    console.print(f"{seconds:.0f} s in all; everything is kept for the next time")
    return DemoResult(comparisons, loads, mixed, speed, seconds)


async def _show_mixed(client: AsyncClient, versions: Sequence[str], console: Console) -> float:
    """One prompt of each task, to the base and to every adapter, all at the same time."""
    answers = [
        [Answer(task.held_out()[-1], adapter) for adapter in ("", *versions)] for task in TASKS
    ]
    flat = [answer for row in answers for answer in row]
    console.rule(f"one mixed batch: {len(flat)} streams at the same time")
    with Live(get_renderable=lambda: report.answers_table(answers), console=console):
        speed = await stream_together(client, flat, _STREAM_TOKENS)
    if not console.is_terminal:
        console.print()  # Live ends its line only on a terminal
    return speed


async def _show_scores(
    client: AsyncClient, versions: Sequence[str], console: Console
) -> tuple[list[Comparison], float]:
    total = 2 * sum(len(task.held_out()) for task in TASKS)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("asking", total=total)
        pairs = list(zip(TASKS, versions, strict=True))
        comparisons, speed = await compare(client, pairs, lambda: progress.advance(bar))
    console.print(report.scores_table(comparisons))
    return comparisons, speed
