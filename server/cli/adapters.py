"""`manylora adapters …`: the server's store and what is on its device, over gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.server.cli.options import DEFAULT_SERVER, Json, Reference, Server
from manylora.server.cli.output import human_bytes, print_json, print_note, print_table

if TYPE_CHECKING:
    from manylora.client import AdapterVersion, Residency

app = typer.Typer(help="Publish adapters, list them, and load them.", no_args_is_help=True)


@app.command()
def publish(
    name: Annotated[str, typer.Argument(metavar="TENANT/NAME", show_default=False)],
    directory: Annotated[
        Path, typer.Argument(show_default=False, help="What peft's save_pretrained wrote.")
    ],
    alias: Annotated[
        list[str] | None, typer.Option(help="Move this alias to the new version; repeatable.")
    ] = None,
    as_json: Json = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Upload a PEFT checkpoint as an adapter's newest version, and print the version's name."""
    from manylora.client import Client

    with Client(server) as client:
        version = client.publish(name, directory, alias or ())
    if as_json:
        print_json(version)
    else:
        print(version.adapter)


@app.command("list")
def list_(
    of: Annotated[
        str,
        typer.Argument(
            metavar="PARENT",
            show_default=False,
            help="TENANT (its adapters) or TENANT/NAME (its versions). Default: everyone's.",
        ),
    ] = "",
    as_json: Json = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """List adapters, each by its newest version."""
    from manylora.client import Client

    with Client(server) as client:
        versions = list(client.list(of))
    if as_json:
        print_json(versions)
        return
    columns = ("ADAPTER", "METHOD", "RANK", "SIZE", "PUBLISHED", "ALIASES", "DEVICE")
    print_table(columns, map(_row, versions))


@app.command()
def show(adapter: Reference, as_json: Json = False, server: Server = DEFAULT_SERVER) -> None:
    """Describe one version."""
    from manylora.client import Client

    with Client(server) as client:
        version = client.get(adapter)
    if as_json:
        print_json(version)
        return
    print_table(
        ("", ""),
        [
            ("adapter", version.adapter),
            ("aliases", ", ".join(version.aliases)),
            ("method", version.peft_type),
            ("rank", str(version.rank)),
            ("size", human_bytes(version.size_bytes)),
            ("digest", version.digest),
            ("published", version.created.isoformat()),
            ("device", _place(version.residency)),
        ],
    )


@app.command()
def load(
    adapter: Reference,
    pin: Annotated[bool, typer.Option("--pin", help="Never evict it for another.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Bring a version to the device, ahead of its first request."""
    from manylora.client import Client

    with Client(server) as client:
        place = client.load(adapter, pin=pin)
    print_note(f"{place.adapter}: {_place(place)}, loaded in {place.load_seconds:.2f} s")


@app.command()
def unload(adapter: Reference, server: Server = DEFAULT_SERVER) -> None:
    """Take a version off the device, pinned or not."""
    from manylora.client import Client

    with Client(server) as client:
        client.unload(adapter)
    print_note(f"{adapter}: no longer on the device")


@app.command()
def delete(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            show_default=False,
            help="TENANT/NAME (all of its versions) or TENANT/NAME@VERSION.",
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Delete a version, or an adapter with all of its versions, from the store."""
    from manylora.client import Client

    if not yes:
        typer.confirm(f"Delete {adapter}?", abort=True, err=True)
    with Client(server) as client:
        client.delete(adapter)
    print_note(f"{adapter}: deleted")


def _row(version: AdapterVersion) -> tuple[str, ...]:
    return (
        version.adapter,
        version.peft_type,
        str(version.rank),
        human_bytes(version.size_bytes),
        version.created.astimezone().strftime("%Y-%m-%d %H:%M"),
        ", ".join(version.aliases),
        _place(version.residency),
    )


def _place(residency: Residency | None) -> str:
    if residency is None:
        return "-"
    words: list[str] = [residency.state]
    if residency.size_bytes:
        words.append(human_bytes(residency.size_bytes))
    if residency.pinned:
        words.append("pinned")
    if residency.in_use:
        words.append(f"{residency.in_use} running")
    if residency.error:
        words.append(residency.error)
    return ", ".join(words)
