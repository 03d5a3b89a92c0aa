"""The base's own head, for an adapter that brings none."""

from __future__ import annotations

import pytest
import torch

from manylora.adapters_store.head import Head, HeadLayer, Task
from manylora.errors import FailedPrecondition
from manylora.server.engine.model.task_view import _own_head

OWN = Head(Task.SEQ_CLS, {"score": HeadLayer(torch.ones(2, 4), None)}, ("a", "b"))


@pytest.mark.parametrize("labels", [(), ("calm", "angry")])
def test_labels_may_be_the_adapters(labels: tuple[str, ...]) -> None:
    head = _own_head(Head(Task.SEQ_CLS, labels=labels), OWN)
    assert head.layers is OWN.layers
    assert head.labels == labels


@pytest.mark.parametrize(
    ("head", "own", "field"),
    [
        (Head(Task.SEQ_CLS, labels=("a", "b", "c")), OWN, "id2label"),
        (Head(Task.TOKEN_CLS), OWN, "safetensors"),
        (Head(Task.SEQ_CLS), None, "safetensors"),
    ],
)
def test_misfits(head: Head, own: Head | None, field: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        _own_head(head, own)
    assert field in caught.value.field
