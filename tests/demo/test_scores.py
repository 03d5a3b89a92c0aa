from __future__ import annotations

import pytest

from manylora.demo.scores import facts, score_email, score_label, score_order


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("billing", 1),
        ("Billing.", 1),
        ("This is about billing", 1),
        ("billing or returns", 0),
        ("returns", 0),
        ("rebilling", 0),
        ("", 0),
    ],
)
def test_label(reply: str, score: float) -> None:
    assert score_label(reply, "billing") == score


ORDER = '{"item": "mug", "quantity": 1, "color": null, "express": false}'


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (ORDER, 1),
        (f"Sure! {ORDER} Bye", 1),
        ('{"item": "mug", "quantity": 2, "color": null, "express": false}', 3 / 4),
        ('{"item": "mug", "quantity": "1", "color": null, "express": false}', 3 / 4),
        ('{"item": "mug", "quantity": true, "color": null, "express": 0}', 2 / 4),
        ('{"item": "mug", "quantity": 1, "express": false}', 3 / 4),
        ('{"item": "mug", "quantity": 1, "color": null, "express": false, "x": 1}', 4 / 5),
        ('{"item": "mug", "quan', 0),
        ("[1]", 0),
        ("mug", 0),
        ("", 0),
    ],
)
def test_order(reply: str, score: float) -> None:
    assert score_order(reply, ORDER) == pytest.approx(score)


NOTE = "pls tell Ms Gray the 9 May visit's off, call 5561. Dan"
REFERENCE = (
    "Subject: Visit on 9 May\n\nDear Ms Gray,\n\n"
    "The visit on 9 May is cancelled. Please call 5561.\n\nKind regards,\nDan"
)


def test_facts_are_names_and_numbers_that_the_note_has() -> None:
    assert facts(NOTE, REFERENCE) == ["5561", "9", "Gray", "May", "Ms"]


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("", "", 0),
        ("Kind regards,", "Yours sincerely,", 0),
        ("Subject: Visit on 9 May\n\n", "", 1),
        ("Dear Ms Gray", "Hello Ms Gray", 1),
        ("Kind regards,\nDan", "Dan", 1),
        ("Dan", "Don", 1),
        ("is cancelled", "isn't on", 1),
        ("Please", "Pls", 1),
        ("5561", "me", 1 / 5),
        ("5561", "5562", 1 + 1 / 5),
        ("Gray", "Grey", 1 + 1 / 5),
    ],
)
def test_email(old: str, new: str, lost: float) -> None:
    reply = REFERENCE.replace(old, new) if old else REFERENCE
    assert score_email(reply, NOTE, REFERENCE) == pytest.approx(1 - lost / 6)


def test_an_empty_email_scores_next_to_nothing() -> None:
    assert score_email("", NOTE, REFERENCE) == pytest.approx(1 / 6)  # it invents no number
