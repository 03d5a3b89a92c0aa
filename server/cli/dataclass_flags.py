"""A command whose flags are a dataclass's fields, each `Annotated[type, "its help"]`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

_Settings = TypeVar("_Settings")


def make_app(
    settings: type[_Settings],
    run: Callable[[_Settings], None],
    text: str,
    *,
    defaults: Mapping[str, object] = MappingProxyType({}),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> typer.Typer:
    """An app of one command that makes a `settings` of its flags and runs it.

    Args:
        text: the command's help.
        defaults: fields with another default here than their own.
        variables: fields that an environment variable may set, with its name.
    """

    def command(**flags: Any) -> None:
        run(settings(**flags))

    hints = get_type_hints(settings, include_extras=True)
    parameters = [
        _parameter(
            field.name,
            hints[field.name],
            defaults.get(field.name, _default(field)),
            variables.get(field.name),
        )
        for field in fields(settings)  # type: ignore[arg-type]
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=text)(command)
    return app


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _parameter(name: str, hint: Any, default: object, variable: str | None) -> inspect.Parameter:
    kind, text = hint.__origin__, hint.__metadata__[0]
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, typer.Option(flag, help=text, envvar=variable)],
    )
