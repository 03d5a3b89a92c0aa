from __future__ import annotations

import pytest
from steps import CASES, PARTS, Timed, split


def test_every_part_is_what_it_takes_away() -> None:
    timed = Timed(step=50.0, layers=40.0, head=3.0)
    plain = Timed(step=30.0, layers=24.0, head=2.0)
    short = Timed(step=24.0, layers=18.0, head=2.0)
    found = split(32, 32, timed, plain, short, products=10.0, floor=25.0)
    assert found.parts == {
        "base products": 13.0,  # with the head
        "edits": 16.0,
        "attention": 6.0,
        "other kernels": 8.0,
        "host": 7.0,
    }
    assert sum(found.parts.values()) == found.step


def test_noise_makes_no_part_negative() -> None:
    timed, plain = Timed(9.0, 10.0, 1.0), Timed(9.0, 10.5, 1.0)
    found = split(1, 1, timed, plain, Timed(9.0, 11.0, 1.0), products=12.0, floor=8.0)
    assert min(found.parts.values()) == 0.0
    assert tuple(found.parts) == PARTS


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_no_more_adapters_than_rows(rows: int) -> None:
    found = [adapters for count, adapters in CASES if count == rows]
    assert found == [n for n in (0, 1, 8, 32) if n <= rows]
