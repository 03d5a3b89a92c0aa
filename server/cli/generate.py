"""`manylora generate`: a prompt in, the answer to the terminal as it is made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.errors import InvalidArgument
from manylora.server.cli.options import DEFAULT_SERVER, Adapter, Json, Server
from manylora.server.cli.output import print_json, print_note, printable

if TYPE_CHECKING:
    from manylora.client import Chunk


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; without one, or as '-', standard input is the prompt."),
    ] = None,
    adapter: Adapter = "",
    chat: Annotated[
        bool, typer.Option("--chat/--plain", help="Through the model's chat template, or as it is.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system message to go before the prompt; needs --chat.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the likeliest, this much.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the likeliest, this many.")] = None,
    min_p: Annotated[float | None, typer.Option(help="At least this share of the best.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answer.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1: none.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="0: none.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="0: none.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end tokens.")
    ] = False,
    as_json: Json = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Answer one prompt, with the base model or one of its adapters."""
    if system is not None and not chat:
        raise InvalidArgument("has no place in a plain prompt", field="--system", wanted="--chat")
    text = read_prompt(prompt)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})

    from manylora.client import Client

    with Client(server) as client:
        chunks = client.stream(
            None if chat else text,
            messages=messages if chat else None,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            stop=stop,
            ignore_eos=ignore_eos or None,
        )
        if as_json:
            _print_whole(chunks)
        else:
            _print_parts(chunks)


def _print_parts(chunks: Iterator[Chunk]) -> None:
    clean = printable if sys.stdout.isatty() else str
    text = ""
    for chunk in chunks:
        text = chunk.text or text
        sys.stdout.write(clean(chunk.text))
        sys.stdout.flush()
    if not text.endswith("\n"):
        print()


def _print_whole(chunks: Iterator[Chunk]) -> None:
    parts = list(chunks)
    last = parts[-1]
    print_json(
        {
            "text": "".join(part.text for part in parts),
            "token_ids": [token for part in parts for token in part.token_ids],
            "adapter": last.adapter,
            "finish_reason": last.finish_reason,
            "usage": last.usage,
        }
    )


def read_prompt(argument: str | None) -> str:
    """The argument, or standard input without its last line's end."""
    if argument is not None and argument != "-":
        return argument
    if sys.stdin.isatty():
        print_note("Reading the prompt from the terminal; Ctrl-D ends it.")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"not UTF-8: {error}", field="standard input") from None
