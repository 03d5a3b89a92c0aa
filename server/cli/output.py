"""What the commands print: answers to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

from manylora.errors import ManyloraError

_WIDEST = 1000  # columns of a table that no terminal shows
_UNPRINTABLE = ("Cc", "Cs")  # Unicode's categories of control characters and surrogates


def print_error(error: ManyloraError) -> None:
    """One red line: the field, what is wrong, what was found, what was wanted."""
    line = " ".join(printable(str(error)).split())
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))


def print_note(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(printable(text), style="dim"))


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns; whole lines, however long, where the output is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else _WIDEST)
    table = Table(*columns, box=None, pad_edge=False, show_header=any(columns))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def printable(text: str) -> str:
    """Text from elsewhere, without control characters, which could steer a terminal, and without
    halves of surrogate pairs, which have no UTF-8."""
    return "".join(c if c in "\n\t" or category(c) not in _UNPRINTABLE else "\ufffd" for c in text)


def human_bytes(count: int) -> str:
    """`1536` → "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
