"""What an adapter was trained to answer with, and the head that it brings for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch


class Task(Enum):
    """PEFT's `task_type`, as far as it is served."""

    CAUSAL_LM = "CAUSAL_LM"  # also where none is named
    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class Problem(Enum):
    """transformers' `problem_type`: how scores come from logits."""

    REGRESSION = "regression"  # as they are
    SINGLE_LABEL = "single_label_classification"  # softmax
    MULTI_LABEL = "multi_label_classification"  # sigmoid


@dataclass(slots=True, frozen=True, eq=False)
class HeadLayer:
    """A linear layer. weight: [out, in]; bias: [out], or None; any float dtype, on any device."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(slots=True, frozen=True, eq=False)
class Head:
    """layers: by their names in the tree ("score", "classifier.dense"); none for
    FEATURE_EXTRACTION, or for the base's own. labels: their names, empty where the adapter does
    not say. problem: None where it does not say."""

    task: Task
    layers: Mapping[str, HeadLayer] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    problem: Problem | None = None
