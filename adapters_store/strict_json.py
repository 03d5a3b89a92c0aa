"""JSON from strangers: one reading of every document, or an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NoReturn

from manylora.errors import InvalidArgument


def loads_object(data: bytes, field: str) -> Mapping[str, object]:
    """Parses one UTF-8 JSON object.

    Refused beyond what RFC 8259 refuses: keys that occur twice, numbers that are not finite, byte
    order marks, nesting or numbers too deep or long for Python's parser. Raises InvalidArgument.
    """
    try:
        value: object = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise InvalidArgument("JSON is nested too deeply", field=field) from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise InvalidArgument(f"not valid JSON: {_first_line(error)}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidArgument("not a JSON object", field=field, found=type(value).__name__)
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:100]!a} occurs twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is out of range")
    return value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
