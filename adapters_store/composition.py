"""Several adapters in one request, as text: `tenant/a*0.7+tenant/b@2*0.3`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from manylora.errors import InvalidArgument

MAX_PARTS = 8
MAX_WEIGHT = 100.0

_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?(e-?[0-9]{1,3})?")


@dataclass(slots=True, frozen=True)
class WeightedRef:
    """ref: see `names.AdapterRef`; not checked yet. weight: what its edits are multiplied by."""

    ref: str
    weight: float


def parse_composition(text: str, field: str = "adapter") -> tuple[WeightedRef, ...]:
    """Reads one adapter's name, or several joined by "+"; each may have "*" and a weight, which is
    1 otherwise.

    Raises InvalidArgument for too many, or a weight that is not a number from -100 to 100, or 0.
    """
    terms = text.split("+")
    if len(terms) > MAX_PARTS:
        raise InvalidArgument(
            "too many adapters in one request",
            field=field,
            found=len(terms),
            wanted=f"at most {MAX_PARTS}",
        )
    return tuple(_parse_term(term, field) for term in terms)


def format_composition(terms: Iterable[WeightedRef]) -> str:
    """The text of several, which reads back as the same."""
    return "+".join(f"{term.ref}*{term.weight!r}" for term in terms)


def check_weight(weight: float, field: str) -> float:
    """Returns a weight that makes sense; else raises InvalidArgument."""
    if not 0 < abs(weight) <= MAX_WEIGHT:  # nor is NaN
        raise InvalidArgument(
            "not a weight",
            field=field,
            found=weight,
            wanted=f"a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, other than 0",
        )
    return weight


def _parse_term(term: str, field: str) -> WeightedRef:
    ref, star, number = term.partition("*")
    if not star:
        return WeightedRef(ref, 1.0)
    if not _NUMBER.fullmatch(number):
        raise InvalidArgument(
            "not a number", field=f"{field} (weight)", found=ascii(number), wanted="as 0.7"
        )
    return WeightedRef(ref, check_weight(float(number), f"{field} (weight)"))
