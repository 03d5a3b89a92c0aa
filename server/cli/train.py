"""`manylora train`: one flag for each field of TrainSettings."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_type_hints

import typer

from manylora.server.cli.output import print_note
from manylora.server.config import default_store
from manylora.training import TrainSettings, train


def make_app() -> typer.Typer:
    """A command of its own: its flags are known only once torch is imported, which every other
    command does without."""

    def command(**flags: Any) -> None:
        """Train a LoRA adapter, and save it as peft does.

        Prints the adapter's directory, or with --publish its name in the store.
        """
        if flags["publish"] and flags["store"] is None:
            flags["store"] = default_store()
        _train(TrainSettings(**flags))

    hints = get_type_hints(TrainSettings, include_extras=True)
    parameters = [_parameter(field, hints[field.name]) for field in fields(TrainSettings)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def _train(settings: TrainSettings) -> None:
    result = train(settings)
    loss = f"loss {result.loss:.3f}"
    if result.validation_loss is not None:
        loss += f", validation loss {result.validation_loss:.3f}"
    print_note(f"{result.steps} steps in {result.seconds:.0f} s, {loss}")
    print(result.directory if result.version is None else result.version.label)


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    kind, text = hint.__origin__, hint.__metadata__[0]
    flag = "--" + field.name.replace("_", "-")
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    envvar = "MANYLORA_STORE" if field.name == "store" else None
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.default is MISSING else field.default,
        annotation=Annotated[kind, typer.Option(flag, help=text, envvar=envvar)],
    )
