"""The order of the rows, fixed for the whole run, and batches of them as tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from manylora.training.encode import IGNORED, Example

_WINDOW = 8  # batches: rows of like length are looked for among so many


def row_order(lengths: Sequence[int], epochs: float, batch_size: int, seed: int) -> list[int]:
    """Indices of all rows of all epochs, in the order in which they are trained on.

    Each epoch is a new shuffle. Among the rows of every _WINDOW batches, rows of like length are
    put into the same batch, and the batches are shuffled: little padding, and no trend in length.
    Depends on nothing but the arguments, so an interrupted run can go on where it was.
    """
    shuffle = random.Random(seed)
    count = len(lengths)
    passes = (shuffle.sample(range(count), count) for _ in range(math.ceil(epochs)))
    stream = list(chain.from_iterable(passes))[: max(1, round(epochs * count))]
    order: list[int] = []
    for window in _chunks(stream, _WINDOW * batch_size):
        batches = _chunks(sorted(window, key=lambda i: lengths[i]), batch_size)
        last = [batches.pop()] if len(batches[-1]) < batch_size else []
        shuffle.shuffle(batches)
        order += chain.from_iterable(batches + last)
    return order


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch for the model and `answer_loss`, padded on the right.

    Logits are wanted only where some row has something to learn next, which spares most of the
    vocabulary's matrix product.

    Returns:
        input_ids, attention_mask: int64 [rows, longest].
        logits_to_keep: int64 [kept], the positions whose logits are wanted.
        labels: int64 [rows, 1 + kept], a column of IGNORED, then what each kept position should
            predict. The Trainer counts what is to be learned in all columns but the first.
    """
    longest = max(len(example.input_ids) for example in examples)

    def pad(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    input_ids = torch.tensor([pad(example.input_ids, pad_id) for example in examples])
    labels = torch.tensor([pad(example.labels, IGNORED) for example in examples])
    mask = torch.tensor([pad([1] * len(example.input_ids), 0) for example in examples])
    keep = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
    filler = torch.full((len(examples), 1), IGNORED)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "logits_to_keep": keep,
        "labels": torch.cat([filler, labels[:, keep + 1]], dim=1),
    }


def _chunks(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
