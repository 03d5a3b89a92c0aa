"""`manylora serve`: one flag for each setting, made from the settings themselves."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from manylora.server.config import ENV_PREFIX, Settings, flag_name, load_settings

HELP = f"""Serve a base model and its adapters over gRPC.

A setting is taken from its flag, else from the environment (--max-waiting is
{ENV_PREFIX}MAX_WAITING), else from the TOML file of --config (max_waiting), else from its default.
Sizes may be written as 2GiB or 500MB.

When requests can be served, one line of JSON on standard output says so, with the addresses in
use. SIGTERM or SIGINT stops: new requests are refused, running ones may end within
--drain-seconds; a second signal stops at once.
"""


def make_command() -> Callable[..., None]:
    """The function whose parameters Typer turns into flags."""

    def serve(**flags: Any) -> None:
        settings = load_settings({n: v for n, v in flags.items() if v not in (None, "")})
        gc.disable()  # takes a fifth of the time of importing, and finds next to nothing
        try:
            from manylora.server.app import run
        finally:
            gc.freeze()  # what was imported stays, and no pass while serving need look at it
            gc.enable()
        run(settings)

    parameters = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in parameters}
    serve.__doc__ = HELP
    return serve


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """An option that is None unless given: defaults and checks are the settings' own."""
    flag, kind = flag_name(name), field.annotation
    value: Any = str
    if kind is bool:
        value, flag = bool, f"{flag}/--no-{flag[2:]}"
    elif get_origin(kind) is tuple:
        value = list[str]
    text = f"{field.description}{_default(field)}"
    option = typer.Option(flag, help=text, metavar=_metavar(kind), show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value | None, option],
    )


def _metavar(kind: Any) -> str | None:
    if kind is bool:
        return None
    if kind is ByteSize:
        return "SIZE"
    if kind in (int, float):
        return "NUMBER"
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
    if choices:
        return "|".join(choices)
    return "TEXT" if kind is str else "PATH"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if field.is_required() or default in (None, "", ()):
        return ""
    if isinstance(default, ByteSize):
        return f" Default: {default.human_readable()}."
    if isinstance(default, bool):
        return f" Default: {'on' if default else 'off'}."
    return f" Default: {default}.".replace(str(Path.home()), "~", 1)
