from __future__ import annotations

from itertools import groupby

from phases import Entry, turns


def test_contenders_take_turns() -> None:
    entries = (Entry("us", {"one": 3, "two": 1}), Entry("them", {"one": 2}))
    assert turns(entries) == [
        (0, "one", 0),
        (1, "one", 0),
        (0, "two", 0),
        (1, "one", 1),
        (0, "one", 1),
        (0, "one", 2),
    ]


def test_nobody_is_always_last() -> None:
    entries = [Entry(name, {"one": 4}) for name in "abc"]
    rounds = [list(group) for _, group in groupby(turns(entries), key=lambda turn: turn[2])]
    assert {group[-1][0] for group in rounds} == {0, 2}
