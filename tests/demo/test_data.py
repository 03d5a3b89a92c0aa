"""The data sets are what the demo's README says of them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from manylora.demo.scores import LABELS, facts
from manylora.demo.tasks import TASKS, Example, Task, read_examples

BY_NAME = {task.name: task for task in TASKS}


def rows(task: Task) -> tuple[list[Example], list[Example]]:
    """Rows to learn, and rows held out."""
    return read_examples(task.train_file), task.held_out()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_enough_rows_and_a_quarter_held_out(task: Task) -> None:
    learned, held_out = rows(task)
    assert len(learned) + len(held_out) >= 120
    assert len(held_out) == (len(learned) + len(held_out)) // 4


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_no_prompt_occurs_twice_or_on_both_sides(task: Task) -> None:
    learned, held_out = rows(task)
    texts = [" ".join(example.text.lower().split()) for example in learned + held_out]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_instruction_is_the_same_in_all_rows(task: Task) -> None:
    learned, held_out = rows(task)
    parts = [example.text.split("\n\n") for example in learned + held_out]
    assert all(len(part) == 2 for part in parts)
    place = 1 if task.name == "tickets" else 0
    assert len({part[place] for part in parts}) == 1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_reference_has_the_full_score(task: Task) -> None:
    for example in (*rows(task)[0], *rows(task)[1]):
        assert task.score(example.reference, example) == 1.0, example


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_of_other_rows_score_worse(task: Task) -> None:
    held_out = task.held_out()
    others = held_out[1:] + held_out[:1]
    scores = [
        task.score(other.reference, example)
        for example, other in zip(held_out, others, strict=True)
    ]
    assert sum(scores) / len(scores) < 0.7


def test_labels_are_balanced_on_both_sides() -> None:
    learned, held_out = rows(BY_NAME["tickets"])
    assert Counter(e.reference for e in learned) == dict.fromkeys(LABELS, 18)
    assert Counter(e.reference for e in held_out) == dict.fromkeys(LABELS, 6)


def test_orders_follow_the_schema_and_quote_the_prompt() -> None:
    learned, held_out = rows(BY_NAME["orders"])
    customers = set()
    for example in learned + held_out:
        order = json.loads(example.reference)
        assert {key: type(value) for key, value in order.items() if value is not None} == {
            "customer": str,
            "item": str,
            "quantity": int,
            **({"color": str} if order["color"] is not None else {}),
            "city": str,
            "express": bool,
        }
        for key in ("customer", "city"):
            assert order[key] in example.text
        assert order["color"] is None or order["color"] in example.text
        assert order["quantity"] > 0
        customers.add(order["customer"])
    assert len(customers) == len(learned) + len(held_out)


def test_emails_have_facts_to_keep() -> None:
    for example in (*rows(BY_NAME["emails"])[0], *rows(BY_NAME["emails"])[1]):
        assert facts(example.text, example.reference), example.text
        assert example.reference.startswith("Subject: ")
        assert "\n\nDear " in example.reference
