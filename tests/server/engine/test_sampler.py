"""The sampler against transformers' own processors, and its draws against their distribution."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from manylora.server.engine.sampler import Sample, _penalise, _threshold, sample
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.types import Request, SamplingParams

VOCAB = 60


def sequence(params: SamplingParams, prompt: Seq[int] = (0,), output: Seq[int] = ()) -> Sequence:
    made = Sequence.start(Request("id", list(prompt), params), frozenset())
    for token in output:
        made.append(token, now=0.0)
    return made


def _token(found: Sample | None) -> int:
    assert found is not None
    return found.token


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def reference(logits: Tensor, params: SamplingParams, prompt: Seq[int], output: Seq[int]) -> Tensor:
    """The distribution by definition: transformers' processors in the documented order, and the
    penalties of OpenAI's API, which transformers lacks. float64 [vocab]."""
    ids = torch.tensor([[*prompt, *output]])
    scores = logits[None].double()
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(list(output), dtype=torch.long), minlength=len(logits))
    scores = scores - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return torch.softmax(scores[0], dim=-1)


def draws(
    logits: Tensor, params: SamplingParams, prompt: Seq[int], output: Seq[int], n: int
) -> Tensor:
    """How often each token comes in n draws of one generator: [vocab]."""
    subject = sequence(params, prompt, output)
    found = sample(logits.repeat(n, 1), [subject] * n)
    return torch.bincount(torch.tensor([_token(s) for s in found]), minlength=logits.shape[-1])


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.4),
    SamplingParams(temperature=2.5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.5, top_k=7),
    SamplingParams(temperature=1.0, top_k=10_000),
    SamplingParams(temperature=1.2, top_p=0.7),
    SamplingParams(temperature=1.0, top_p=1e-9),
    SamplingParams(temperature=1.0, top_p=0.999),
    SamplingParams(temperature=1.3, min_p=0.1),
    SamplingParams(temperature=1.3, min_p=1.0),
    SamplingParams(temperature=2.0, top_k=12, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=2.0, top_k=12, top_p=0.95, min_p=0.3),
    SamplingParams(temperature=1.0, repetition_penalty=1.7),
    SamplingParams(temperature=1.0, repetition_penalty=0.6),
    SamplingParams(temperature=1.0, presence_penalty=1.5),
    SamplingParams(temperature=1.0, presence_penalty=-2.0, frequency_penalty=0.7),
    SamplingParams(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.2,
        frequency_penalty=1.0,
    ),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_draws_follow_the_distribution(number: int) -> None:
    """Only tokens that the reference keeps, each of them about as often as it says (chi-square,
    fixed seeds; bound far beyond what chance does)."""
    params = CASES[number]
    prompt, output = [1, 2, 2, 3, 59], [4, 5, 4, 4, 3]
    logits = random_logits(number)[0]
    wanted = reference(logits, params, prompt, output)
    total = 2000
    counts = draws(logits, replace(params, seed=number), prompt, output, total)
    assert int(counts.sum()) == total
    assert not counts[wanted == 0].any()
    expected = wanted * total
    often = expected >= 5
    rest = torch.stack([counts[~often].sum(), expected[~often].sum()])
    pairs = [*zip(counts[often].tolist(), expected[often].tolist(), strict=True)]
    if rest[1] > 1:
        pairs.append((int(rest[0]), float(rest[1])))
    chi_square = sum((found - e) ** 2 / e for found, e in pairs)
    freedom = len(pairs) - 1
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5 + 1


@given(
    seed=st.integers(0, 2**32),
    repetition=st.floats(0.01, 100),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=10),
)
def test_penalties_by_definition(
    seed: int,
    repetition: float,
    presence: float,
    frequency: float,
    prompt: list[int],
    output: list[int],
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    row = random_logits(seed)[0]
    wanted = row.clone()
    for token in {*prompt, *output}:
        wanted[token] *= repetition if wanted[token] < 0 else 1 / repetition
    for token in set(output):
        wanted[token] -= presence + frequency * output.count(token)
    _penalise(row, sequence(params, prompt, output))
    torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 2**32),
    spread=st.floats(0.01, 3),
    vocab=st.sampled_from([2, 64, VOCAB, 1024, 4096]),
    top_k=st.sampled_from([0, 1, 3, 50, 3000]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-9, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
)
def test_what_is_kept_is_what_transformers_keeps(
    seed: int, spread: float, vocab: int, top_k: int, top_p: float, min_p: float
) -> None:
    """But for a token just at the edge of top_p or min_p, where rounding decides."""
    logits = random_logits(seed, vocab=vocab)[0] * spread
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    weights = (logits - logits.max()).exp()
    kept = weights >= _threshold(weights.numpy(), params)
    nudge = 1e-5
    least = reference(logits, replace(params, top_p=top_p * (1 - nudge), min_p=min_p), [0], [])
    most_p, most_min = min(top_p * (1 + nudge), 1.0), min_p * (1 - nudge)
    most = reference(logits, replace(params, top_p=most_p, min_p=most_min), [0], [])
    least[least < min_p * (1 + nudge) * least.max()] = 0
    assert not (kept & (most == 0)).any()
    assert not (~kept & (least > 0)).any()
    assert kept.any()


@given(seed=st.integers(0, 2**32), params=st.sampled_from(CASES), greedy=st.booleans())
def test_a_row_does_not_depend_on_its_neighbours(
    seed: int, params: SamplingParams, greedy: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(int(rng.integers(1 << 30)), rows=7)
    rows = [CASES[i] for i in rng.integers(len(CASES), size=7)]
    at = int(rng.integers(7))
    rows[at] = replace(params, seed=seed, logprobs=3)
    if greedy:
        rows[at] = replace(rows[at], temperature=0.0)
    together = sample(logits.clone(), [sequence(p, [1, 2], [3]) for p in rows])[at]
    alone = sample(logits[at : at + 1].clone(), [sequence(rows[at], [1, 2], [3])])[0]
    assert together == alone


def test_the_seed_decides() -> None:
    logits = random_logits(5)[0] * 0.1

    def run(seed: int | None) -> list[int]:
        subject = sequence(SamplingParams(temperature=1.0, seed=seed))
        return [_token(sample(logits.clone()[None], [subject])[0]) for _ in range(30)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(2**64 - 1) == run(2**64 - 1)
    assert run(None) != run(None)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [9, 4, 30]] = 2.0
    assert _token(sample(logits, [sequence(SamplingParams())])[0]) == 4


def test_greedy_minds_the_penalties() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 4], logits[:, 9] = 2.0, 1.5
    subjects = [
        sequence(SamplingParams(repetition_penalty=1.5), prompt=[4]),
        sequence(SamplingParams(presence_penalty=1.0), prompt=[4]),
        sequence(SamplingParams(frequency_penalty=0.3), output=[4, 4]),
    ]
    assert [_token(s) for s in sample(logits, subjects)] == [9, 4, 9]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-39, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(1, rows=20)
    logits[3, 7] = -torch.inf
    wanted = logits.argmax(dim=-1).tolist()
    params = SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1, seed=1)
    found = sample(logits, [sequence(params) for _ in wanted])
    assert [_token(s) for s in found] == wanted


def test_a_huge_temperature_is_even() -> None:
    params = SamplingParams(temperature=100.0, seed=3)
    counts = draws(random_logits(1)[0] * 0.1, params, [0], [], 3000)
    assert counts.min() > 20
    assert counts.max() < 90


def test_what_is_impossible_is_never_drawn() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [3, 8]] = torch.tensor([0.0, 1.0])
    for params in (
        SamplingParams(temperature=100.0, seed=1),
        SamplingParams(temperature=1.0, top_k=50, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9999, seed=1),
    ):
        assert set(draws(logits[0], params, [0], [], 100).nonzero()[:, 0].tolist()) == {3, 8}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers(bad: float, temperature: float) -> None:
    """They have no token; their neighbours do not notice."""
    logits = random_logits(2, rows=4)
    logits[1, 17] = bad
    logits[2] = -torch.inf
    params = SamplingParams(
        temperature=temperature, seed=1, logprobs=2, repetition_penalty=1.1, top_p=0.9
    )
    found = sample(logits.clone(), [sequence(params) for _ in range(4)])
    clean = sample(logits[[0, 3]].clone(), [sequence(params) for _ in range(2)])
    assert found[1] is None
    assert found[2] is None
    assert [found[0], found[3]] == clean


@pytest.mark.parametrize("number", [0, 1, 5, VOCAB, VOCAB + 7])
def test_logprobs_are_the_models_own(number: int) -> None:
    """Before penalties and temperature, of the token drawn and of the likeliest."""
    logits = random_logits(4)
    raw = torch.log_softmax(logits[0].double(), dim=-1)
    params = SamplingParams(temperature=3.0, repetition_penalty=2.0, seed=1, logprobs=number)
    found = sample(logits.clone(), [sequence(params, prompt=range(30))])[0]
    assert found is not None
    assert found.logprobs is not None
    assert found.logprobs.chosen.token_id == found.token
    assert found.logprobs.chosen.logprob == pytest.approx(float(raw[found.token]), abs=1e-5)
    order = raw.argsort(descending=True)[:number].tolist()
    assert [top.token_id for top in found.logprobs.top] == order
    for top in found.logprobs.top:
        assert top.logprob == pytest.approx(float(raw[top.token_id]), abs=1e-5)


def test_no_logprobs_unless_asked() -> None:
    found = sample(random_logits(1), [sequence(SamplingParams())])[0]
    assert found is not None
    assert found.logprobs is None


def test_no_rows() -> None:
    assert sample(torch.zeros(0, VOCAB), []) == []
