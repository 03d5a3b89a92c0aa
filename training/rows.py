"""Training rows, read strictly: what is not understood is an error, never skipped.

A file is JSONL in UTF-8. Each line is one of

    {"prompt": "…", "completion": "…"}
    {"messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …]}

where the last message is the assistant's. Lines of white space are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters_store.strict_json import loads_object
from manylora.errors import InvalidArgument

ROLES = ("system", "user", "assistant")


@dataclass(slots=True, frozen=True)
class Message:
    role: str  # one of ROLES
    content: str


@dataclass(slots=True, frozen=True)
class Completion:
    """A text and how it goes on, with no template around them."""

    where: str  # "file:line", for errors
    prompt: str
    completion: str


@dataclass(slots=True, frozen=True)
class Chat:
    """A conversation; every message of the assistant's is to be learned."""

    where: str
    messages: tuple[Message, ...]


Row = Completion | Chat


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises InvalidArgument naming file, line and field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(
            "cannot read the rows", field=str(path), found=error.strerror
        ) from None
    rows = list(_parse_lines(data, path.name))
    if not rows:
        raise InvalidArgument("there is no row", field=str(path))
    return rows


def _parse_lines(data: bytes, name: str) -> Iterator[Row]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield _parse_row(loads_object(line, f"{name}:{number}"), f"{name}:{number}")


def _parse_row(value: Mapping[str, object], where: str) -> Row:
    keys = set(value)
    if keys == {"prompt", "completion"}:
        prompt = _text(value["prompt"], f"{where}: prompt")
        return Completion(where, prompt, _text(value["completion"], f"{where}: completion"))
    if keys == {"messages"}:
        return Chat(where, _parse_messages(value["messages"], f"{where}: messages"))
    raise InvalidArgument(
        "not a row",
        field=where,
        found=f"the fields {', '.join(ascii(key) for key in sorted(keys)) or '(none)'}",
        wanted="'prompt' and 'completion', or 'messages', and no other field",
    )


def _parse_messages(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidArgument("not a conversation", field=field, wanted="a list of messages")
    messages = tuple(_parse_message(item, f"{field}[{i}]") for i, item in enumerate(value))
    if messages[-1].role != "assistant":
        raise InvalidArgument(
            "there is no answer to learn",
            field=f"{field}[{len(messages) - 1}].role",
            found=messages[-1].role,
            wanted="assistant",
        )
    return messages


def _parse_message(value: object, field: str) -> Message:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise InvalidArgument(
            "not a message", field=field, found=value, wanted="an object of 'role' and 'content'"
        )
    role = value["role"]
    if role not in ROLES:
        raise InvalidArgument(
            "unknown role", field=f"{field}.role", found=role, wanted=", ".join(ROLES)
        )
    return Message(role, _text(value["content"], f"{field}.content"))


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidArgument("not text", field=field, found=value, wanted="a string, not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidArgument("half a surrogate pair", field=field, wanted="valid Unicode")
    return value
