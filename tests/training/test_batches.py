from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from manylora.training.batches import collate, row_order
from manylora.training.encode import IGNORED, Example
from manylora.training.train import answer_loss

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 3), st.integers(1, 9), st.integers(0, 5))
def test_each_epoch_has_each_row_once(
    lengths: list[int], epochs: int, batch_size: int, seed: int
) -> None:
    order = row_order(lengths, epochs, batch_size, seed)
    assert Counter(order) == dict.fromkeys(range(len(lengths)), epochs)
    assert order == row_order(lengths, epochs, batch_size, seed)


def test_an_epoch_may_be_a_part() -> None:
    order = row_order([5] * 10, 1.5, 4, 0)
    assert len(order) == 15
    assert max(Counter(order).values()) == 2
    assert len(row_order([5] * 10, 0.01, 4, 0)) == 1


def test_batches_have_rows_of_like_length_and_no_trend() -> None:
    lengths = [10 * (i % 8) + 10 for i in range(64)]
    order = row_order(lengths, 1, 8, seed=3)
    batches = [[lengths[i] for i in order[start : start + 8]] for start in range(0, 64, 8)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert batches != sorted(batches)
    assert order != row_order(lengths, 1, 8, seed=4)


def test_a_batch_by_hand() -> None:
    first = Example([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8])
    second = Example([5, 9], [IGNORED, 9])
    batch = collate([first, second], pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8], [5, 9, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "logits_to_keep": [0, 1, 2],
        "labels": [[IGNORED, IGNORED, 7, 8], [IGNORED, 9, IGNORED, IGNORED]],
    }


def test_logits_are_kept_only_where_something_is_learned() -> None:
    batch = collate([Example([1, 2, 3, 4, 5], [IGNORED] * 3 + [4, 5])], pad_id=0)
    assert batch["logits_to_keep"].tolist() == [2, 3]
    assert batch["labels"].tolist() == [[IGNORED, 4, 5]]


@pytest.mark.parametrize("count", [None, 20])
def test_the_loss_is_transformers_own(base: Path, count: int | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    examples = [
        Example([1, 40, 41, 42, 43, 44], [IGNORED] * 3 + [42, 43, 44]),
        Example([1, 50, 51], [IGNORED, 50, 51]),
    ]
    batch = collate(examples, pad_id=0)
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = answer_loss(model(**batch), labels, count)
        padded = torch.tensor([examples[0].labels, examples[1].labels + [IGNORED] * 3])
        expected = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=padded,
            num_items_in_batch=count,
        ).loss
    torch.testing.assert_close(loss, expected)
