"""`manylora check` and `manylora merge`: one adapter beside its base, without a server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from manylora.server.cli.options import Json
from manylora.server.cli.output import print_json, print_note

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER", show_default=False, help="What peft's save_pretrained wrote."
    ),
]
Base = Annotated[
    Path,
    typer.Option("--base", show_default=False, help="Directory of the base's checkpoint."),
]


def check(
    adapter: Checkpoint,
    base: Base,
    prompt: Annotated[
        str, typer.Option(help="What both are asked.")
    ] = "The quick brown fox jumps over the lazy dog.",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, of both.")] = "float32",
    device: Annotated[str, typer.Option(help="Where ours runs: cpu or cuda.")] = "cpu",
    tolerance: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            help="Largest difference allowed, of the largest logit or of 1. Default: 0.0001; "
            "0.01 with float16, 0.05 with bfloat16.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare what is served for an adapter with what peft computes, logit by logit.

    Prints the largest difference. Exit status 0: within the tolerance; 1: not.
    """
    from manylora.server.offline.check import compare

    found = compare(base, adapter, prompt, dtype=dtype, device=device, tolerance=tolerance)
    if as_json:
        print_json(asdict(found) | {"holds": found.holds})
    else:
        print(
            f"largest difference {found.difference:.2e}: {'as' if found.holds else 'NOT as'} peft"
        )
        effect = (
            "" if found.effect is None else f", the adapter moves them by up to {found.effect:.3g}"
        )
        print_note(
            f"{found.task}, {found.tokens} tokens; peft's values up to {found.size:.3g}{effect}"
        )
    if not found.holds:
        raise typer.Exit(1)


def merge(
    adapter: Checkpoint,
    base: Base,
    out: Annotated[
        Path, typer.Option("--out", show_default=False, help="A new directory for the result.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, float16, bfloat16; auto: the base's.")
    ] = "auto",
) -> None:
    """Write the base with an adapter merged into its weights, by peft: a base of its own.

    Also for methods that are not served as adapters. The result is read back and asked before it
    is kept.
    """
    from manylora.server.offline.merge import merge as merge_adapter

    print(merge_adapter(base, adapter, out, dtype=dtype))
