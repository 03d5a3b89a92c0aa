"""Options and arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Server = Annotated[
    str,
    typer.Option(
        "--server", envvar="MANYLORA_SERVER", metavar="HOST:PORT", help="The server to talk to."
    ),
]
DEFAULT_SERVER = "localhost:50051"

Reference = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        show_default=False,
        help="TENANT/NAME (the newest version), TENANT/NAME@VERSION or TENANT/NAME:ALIAS.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
