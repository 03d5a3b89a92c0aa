"""Heads: how transformers' classes for other tasks make logits of a base's hidden rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BloomForSequenceClassification,
    BloomForTokenClassification,
    FalconForSequenceClassification,
    FalconForTokenClassification,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    OPTForSequenceClassification,
    PreTrainedConfig,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.head import Head, HeadLayer, Task
from manylora.errors import FailedPrecondition
from manylora.server.engine.types import Rows

SEQUENCE_CLASSES: tuple[type[Any], ...] = (
    GenericForSequenceClassification,
    BloomForSequenceClassification,
    FalconForSequenceClassification,
    GPT2ForSequenceClassification,
    GPTNeoXForSequenceClassification,
    OPTForSequenceClassification,
)
"""One linear layer on the last row that is no padding."""

TOKEN_CLASSES: tuple[type[Any], ...] = (
    GenericForTokenClassification,
    BloomForTokenClassification,
    FalconForTokenClassification,
    GPT2ForTokenClassification,
    GPTNeoXForTokenClassification,
)
"""One linear layer on every row."""


@dataclass(slots=True, frozen=True)
class LayerShape:
    """A linear layer of a head. out_size: None where it is the number of labels."""

    in_size: int
    out_size: int | None
    bias: bool


@dataclass(slots=True, frozen=True)
class HeadForm:
    """What a class of transformers puts on the base for one task.

    rows: which of the base's. layers: the adapter's own, in order, tanh between them; by their
    names in the tree. stem: the base's own module before them, by its name in our tree, or "".
    """

    rows: Rows
    layers: Mapping[str, LayerShape]
    stem: str = ""

    def check(self, head: Head) -> None:
        """Raises FailedPrecondition, naming the tensor, if the head is not of this form."""
        for name in (*self.layers, *head.layers):
            field = f"{WEIGHTS_FILE}: base_model.model.{name}.weight"
            shape, layer = self.layers.get(name), head.layers.get(name)
            if shape is None or layer is None:
                raise FailedPrecondition(
                    "not the head of this base",
                    field=field,
                    found=", ".join(head.layers),
                    wanted=", ".join(self.layers),
                )
            out_size = shape.out_size or layer.weight.shape[0]
            if layer.weight.shape != (out_size, shape.in_size):
                raise FailedPrecondition(
                    "the tensor's shape does not fit",
                    field=field,
                    found=list(layer.weight.shape),
                    wanted=f"[{shape.out_size or 'labels'}, {shape.in_size}]",
                )
            if (layer.bias is not None) != shape.bias:
                raise FailedPrecondition(
                    f"the base's head has {'a' if shape.bias else 'no'} bias here",
                    field=field.replace(".weight", ".bias"),
                )

    def logits(self, head: Head, rows: Tensor) -> Tensor:
        """rows: [n, hidden], any float dtype → float32 [n, labels]."""
        x = rows.float()
        for i, name in enumerate(self.layers):
            x = _apply(head.layers[name], torch.tanh(x) if i else x)
        return x


def _apply(layer: HeadLayer, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def decoder_forms(config: PreTrainedConfig) -> Mapping[Task, HeadForm]:
    """Of a causal language model, as far as transformers has classes for it whose way is known."""
    forms: dict[Task, HeadForm] = {}
    kinds = (
        (Task.SEQ_CLS, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, SEQUENCE_CLASSES),
        (Task.TOKEN_CLS, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, TOKEN_CLASSES),
    )
    for task, mapping, known in kinds:
        made = mapping.get(type(config), None)
        if made is not None and issubclass(made, known):
            rows = Rows.LAST_UNPADDED if task is Task.SEQ_CLS else Rows.ALL
            forms[task] = HeadForm(rows, head_layers(made, config))
    return forms


def encoder_forms(config: PreTrainedConfig, stems: Mapping[Task, str]) -> Mapping[Task, HeadForm]:
    """Of an encoder. stems: by the tasks that it serves, see `HeadForm`."""
    means = getattr(config, "classifier_pooling", "cls") == "mean"  # ModernBERT's
    forms: dict[Task, HeadForm] = {}
    if Task.SEQ_CLS in stems:
        layers = head_layers(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)], config)
        rows = Rows.MEAN if means else Rows.FIRST
        forms[Task.SEQ_CLS] = HeadForm(rows, layers, stems[Task.SEQ_CLS])
    if Task.TOKEN_CLS in stems:
        layers = head_layers(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)], config)
        forms[Task.TOKEN_CLS] = HeadForm(Rows.ALL, layers, stems[Task.TOKEN_CLS])
    return forms


def head_layers(kind: Any, config: PreTrainedConfig) -> Mapping[str, LayerShape]:
    """The linear layers that a class of transformers has beside its base, in the tree's order."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = kind(config)
    found = {
        str(name): module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.partition(".")[0] in ("classifier", "score")
    }
    last = list(found)[-1]
    return {
        name: LayerShape(
            module.in_features,
            None if name == last else module.out_features,
            module.bias is not None,
        )
        for name, module in found.items()
    }
