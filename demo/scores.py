"""How good an answer is, from 0 to 1: the same for the base and for the adapters."""

from __future__ import annotations

import json
import re

LABELS = ("billing", "delivery", "returns", "account", "technical", "feedback")

_CLOSINGS = (
    "Kind regards,",
    "Best regards,",
    "Yours sincerely,",
    "Yours faithfully,",
    "Sincerely,",
)
_SLANG = re.compile(
    r"\b(?:\w+'(?:t|re|ve|ll|d|m)|(?:it|that|what|there|he|she|who|let|here)'s|u|ur|r|pls|plz|thx"
    r"|gonna|wanna|gotta|gimme|lemme|ya|yo|hey|hi|hiya|nope|yup|asap|em|b4|2nite|2day|tmrw|bout"
    r"|lol|tix|dunno|ain't|luv|ta|cheers|kinda|outta|smth|sry|guys|folks|cuz|ok)\b|w/|!!|\?\?",
    re.IGNORECASE,
)


def score_label(reply: str, reference: str) -> float:
    """1 if the reply names the right label and no other."""
    named = [label for label in LABELS if re.search(rf"\b{label}\b", reply.lower())]
    return float(named == [reference])


def score_order(reply: str, reference: str) -> float:
    """The share of the fields that are right, in value and JSON type, of all that are wanted or
    given; 0 if there is no JSON object between the reply's outermost braces."""
    wanted = json.loads(reference)
    try:
        found = json.loads(reply[reply.find("{") : reply.rfind("}") + 1])
    except ValueError:
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    right = sum(k in found and _same(found[k], value) for k, value in wanted.items())
    return right / len(wanted.keys() | found.keys())


def score_email(reply: str, note: str, reference: str) -> float:
    """The mean of six checks: a subject line first, a greeting by the right name, a formal
    closing with the sender's name last, no slang or contraction, the share of the facts that it
    keeps, and no number that is not in the note."""
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()] or [""]
    wanted = [line for line in reference.splitlines() if line]
    kept = facts(note, reference)
    checks = [
        bool(re.fullmatch(r"Subject: .+", lines[0])),
        wanted[1] in lines,
        lines[-2:] in [[closing, wanted[-1]] for closing in _CLOSINGS],
        bool(reply.strip()) and not _SLANG.search(reply),
        sum(_has_word(reply, fact) for fact in kept) / len(kept),
        _numbers(reply) <= _numbers(note),
    ]
    return sum(checks) / len(checks)


def facts(note: str, reference: str) -> list[str]:
    """What an e-mail must keep of its note: the words of the reference that have a digit or a
    capital inside a line, and occur in the note."""
    words = re.findall(
        r"(?<![.?:] )(?<!^)\b(?:[A-HJ-Z]\w*|I\w+|\w*\d\w*)\b", reference, re.MULTILINE
    )
    return sorted({word for word in words if _has_word(note.lower(), word.lower())})


def _same(found: object, wanted: object) -> bool:
    return type(found) is type(wanted) and found == wanted


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text))
