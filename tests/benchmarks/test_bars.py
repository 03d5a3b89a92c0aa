from __future__ import annotations

import pytest
from bars import BARS, OURS, OVER_GRPC, VLLM, as_json, judge
from records import Figure, Record, Results


def _add(results: Results, contender: str, workload: str, *, speed: float = 1.0, token: float = 1):
    results.add(Record(contender, workload, 0, 64 / speed, 64, token, token, 0, 0.0))


def test_speeds_are_ours_over_theirs() -> None:
    results = Results()
    _add(results, OURS, "base-32", speed=500)
    _add(results, VLLM, "base-32", speed=400)
    (judged,) = judge(results, ["base-32 / vllm"])
    assert judged.value == pytest.approx(1.25)
    assert judged.holds


def test_the_least_and_the_most() -> None:
    results = Results()
    _add(results, OURS, "single-base", token=0.010)
    _add(results, OURS, "single-adapter", token=0.012)
    _add(results, VLLM, "single-base", token=0.020)
    found = judge(results, [bar.name for bar in BARS])
    held = {j.bar.name: j.holds for j in found if j.value is not None}
    assert held == {
        "single-base per token / vllm": True,
        "single-adapter per token / single-base": False,
    }


def test_medians_are_compared() -> None:
    results = Results()
    for speed in (100, 400, 410):
        _add(results, OURS, "distinct-32", speed=speed)
    for speed in (500, 500, 90):
        _add(results, OURS, "base-32", speed=speed)
    (judged,) = judge(results, ["distinct-32 / base-32"])
    assert judged.value == pytest.approx(0.8)


def test_a_cold_adapter_costs_what_it_takes_longer() -> None:
    results = Results()
    for cold, resident in ((0.081, 0.060), (0.090, 0.061), (0.500, 0.061)):
        _add(results, OVER_GRPC, "cold-adapter", token=cold)
        _add(results, OVER_GRPC, "resident-adapter", token=resident)
    (judged,) = judge(results, ["cold adapter, ms"])
    assert judged.value == pytest.approx(29)


def test_what_was_not_measured_does_not_hold() -> None:
    results = Results()
    results.add(Figure("serve-start-seconds", 6.0))
    found = as_json(judge(results, ["serve start, s", "base-32 / vllm"]))
    assert found == {
        "bars": {
            "base-32 / vllm": {"value": None, "bar": 1.1, "holds": False},
            "serve start, s": {"value": 6.0, "bar": 10, "holds": True},
        }
    }


def test_twelve_bars_with_names_of_their_own() -> None:
    assert len({bar.name for bar in BARS}) == 12
