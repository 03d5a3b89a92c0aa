"""`manylora demo`: one flag for each field of DemoSettings."""

from __future__ import annotations

import typer

from manylora.demo import DemoSettings, run_demo
from manylora.server.cli import dataclass_flags

HELP = """Train three adapters on a small base model, serve them beside it, and compare.

The first time fetches the base and trains; the next times find both in the cache.
"""


def make_app() -> typer.Typer:
    return dataclass_flags.make_app(DemoSettings, _run, HELP, variables={"cache": "MANYLORA_CACHE"})


def _run(settings: DemoSettings) -> None:
    run_demo(settings)
