"""The command `manylora`. Heavy imports wait until the command that needs them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from manylora import __version__
from manylora.errors import InvalidArgument, ManyloraError
from manylora.server.cli import adapters, doctor, generate, look, offline, serve
from manylora.server.cli.output import print_error

app = typer.Typer(
    name="manylora",
    help="One base model, thousands of hot-loaded adapters, one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.make_command())
app.add_typer(adapters.app, name="adapters")
app.command("generate")(generate.generate)
app.command("classify")(look.classify)
app.command("embed")(look.embed)
app.command("check")(offline.check)
app.command("merge")(offline.merge)
app.command("doctor")(doctor.doctor)


# The flags of these two are known only once torch is imported, which the others do without.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("train", add_help_option=False, context_settings=_PASS_ON)
def _train(context: typer.Context) -> None:
    """Train a LoRA adapter, and save it as peft does."""
    from manylora.server.cli import train

    train.make_app()(context.args, prog_name=context.command_path)


@app.command("demo", add_help_option=False, context_settings=_PASS_ON)
def _demo(context: typer.Context) -> None:
    """Train three adapters on a small base model, serve them beside it, and compare."""
    from manylora.server.cli import demo

    demo.make_app()(context.args, prog_name=context.command_path)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"manylora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """One base model, thousands of hot-loaded adapters, one batch."""


def main() -> None:
    """Runs one command. Exit codes: 2 for wrong usage, 1 for what failed."""
    try:
        app()
    except ManyloraError as error:
        print_error(error)
        sys.exit(2 if isinstance(error, InvalidArgument) else 1)
