"""`manylora train`: one flag for each field of TrainSettings."""

from __future__ import annotations

import typer

from manylora.server.cli import dataclass_flags
from manylora.server.cli.output import print_note
from manylora.server.config import default_store
from manylora.training import TrainSettings, train

HELP = """Train a LoRA adapter, and save it as peft does.

Prints the adapter's directory, or with --publish its name in the store.
"""


def make_app() -> typer.Typer:
    return dataclass_flags.make_app(
        TrainSettings,
        _train,
        HELP,
        defaults={"store": default_store()},
        variables={"store": "MANYLORA_STORE"},
    )


def _train(settings: TrainSettings) -> None:
    result = train(settings)
    loss = f"loss {result.loss:.3f}"
    if result.validation_loss is not None:
        loss += f", validation loss {result.validation_loss:.3f}"
    print_note(f"{result.steps} steps in {result.seconds:.0f} s, {loss}")
    print(result.directory if result.version is None else result.version.label)
