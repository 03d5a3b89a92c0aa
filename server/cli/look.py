"""`manylora classify` and `manylora embed`: a text's class by an adapter's head, or its vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from manylora.server.cli.generate import read_prompt
from manylora.server.cli.options import DEFAULT_SERVER, Adapter, Json, Server
from manylora.server.cli.output import print_json, print_table

if TYPE_CHECKING:
    from manylora.client import Classification, TokenClassification

Text = Annotated[
    str | None,
    typer.Argument(help="The text; without one, or as '-', standard input is the text."),
]
Second = Annotated[
    str | None, typer.Option(help="A second text that goes with it, as an answer to a question.")
]


def classify(
    text: Text = None,
    second: Second = None,
    adapter: Adapter = "",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Each token, by a TOKEN_CLS adapter.")
    ] = False,
    as_json: Json = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Score a text with an adapter's classifier, the likeliest label first."""
    alone, pair = _read_texts(text, second)

    from manylora.client import Client

    with Client(server) as client:
        if tokens:
            answer = client.classify_tokens(alone, pair=pair, adapter=adapter)
            print_json(answer) if as_json else _print_tokens(answer, pair or (alone or "", ""))
        else:
            found = client.classify(alone, pair=pair, adapter=adapter)
            print_json(found) if as_json else _print_labels(found)


def embed(
    text: Text = None,
    second: Second = None,
    adapter: Adapter = "",
    pooling: Annotated[
        Literal["first", "last", "mean"] | None,
        typer.Option(help="Of the tokens' rows. Default: mean on encoders, last on others."),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="To length 1.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Print a text's vector, as JSON."""
    alone, pair = _read_texts(text, second)

    from manylora.client import Client

    with Client(server) as client:
        print_json(
            client.embed(alone, pair=pair, adapter=adapter, pooling=pooling, normalize=normalize)
        )


def _read_texts(text: str | None, second: str | None) -> tuple[str | None, tuple[str, str] | None]:
    """The text alone, or the pair: one of them."""
    first = read_prompt(text)
    return (first, None) if second is None else (None, (first, second))


def _print_labels(found: Classification) -> None:
    rows = sorted(zip(found.scores, found.labels, found.logits, strict=True), reverse=True)
    print_table(
        ("label", "score", "logit"),
        [(label, f"{score:.4f}", f"{logit:.4f}") for score, label, logit in rows],
    )


def _print_tokens(found: TokenClassification, texts: tuple[str, str]) -> None:
    rows = []
    for token in found.tokens:
        start, end = token.span or (0, 0)
        piece = texts[token.text][start:end]
        rows.append((piece, token.label, f"{max(token.scores):.4f}"))
    print_table(("token", "label", "score"), rows)
