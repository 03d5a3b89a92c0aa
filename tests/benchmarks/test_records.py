from __future__ import annotations

from pathlib import Path

import pytest
from peers.protocol import Outcome
from records import Figure, Record, Results, first_token, load, per_token, spread


def _record(repeat: int, seconds: float) -> Record:
    return Record("me", "base-32", repeat, seconds, 100, 0.5, None, 1 << 20, 2.0)


def test_spread() -> None:
    found = spread([3.0, None, 1.0, 8.0])
    assert found is not None
    assert (found.median, found.low, found.high, found.count) == (3.0, 1.0, 8.0, 3)
    assert spread([None]) is None


def test_times_of_an_outcome() -> None:
    outcome = Outcome(9.0, tokens=33, first=[1.0, 2.0, 4.0], last=[6.0, 8.0, 9.0])
    assert first_token(outcome) == 2.0
    assert per_token(outcome) == pytest.approx(0.5)  # (5, 6, 5) over 10 tokens after the first


def test_times_that_a_contender_cannot_tell() -> None:
    assert first_token(Outcome(9.0, 10)) is None
    assert per_token(Outcome(9.0, 10, first=[1.0])) is None
    assert per_token(Outcome(9.0, 1, first=[1.0], last=[1.0])) is None


def test_nothing_is_lost_by_a_break(tmp_path: Path) -> None:
    results = Results(tmp_path / "records.jsonl")
    results.add(_record(0, 2.0))
    results.add(Figure("start", 4.0))
    results.add(_record(1, 4.0))
    again = load(tmp_path / "records.jsonl")
    assert again.records == results.records
    assert again.figures == results.figures
    found = again.spread("me", "base-32", lambda record: record.tokens_per_second)
    assert found is not None
    assert (found.median, found.low, found.high) == (37.5, 25.0, 50.0)
    assert again.spread("you", "base-32", lambda record: record.seconds) is None
