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
Adapter = Annotated[
    str,
    typer.Option(
        "--adapter",
        "-a",
        show_default=False,
        help="TENANT/NAME, TENANT/NAME@VERSION or TENANT/NAME:ALIAS; several at once with "
        "weights: TENANT/A*0.7+TENANT/B*0.3. Default: the base.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
