"""Masks are understood by asking them, and only causal ones, with or without a window, pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from manylora.server.engine.model.record import causal_window

Mask = Callable[..., torch.Tensor]


def image_tokens(_: object, __: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (query < 5) & (key < 5)


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (causal_mask_function, 0),
        (sliding_window_causal_mask_function(1), 1),
        (sliding_window_causal_mask_function(60), 60),
        (sliding_window_causal_mask_function(999), 999),
        (sliding_window_causal_mask_function(1000), 0),
        (sliding_window_causal_mask_function(4096), 0),
        (and_masks(causal_mask_function, sliding_window_causal_mask_function(8)), 8),
        (chunked_causal_mask_function(1000, torch.zeros(1, dtype=torch.int)), 0),
        (chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.int)), None),
        (chunked_causal_mask_function(500, torch.zeros(1, dtype=torch.int)), None),
        (bidirectional_mask_function, None),
        (sliding_window_bidirectional_mask_function(8), None),
        (or_masks(causal_mask_function, image_tokens), None),
    ],
)
def test_window_of_a_mask(mask: Mask, window: int | None) -> None:
    assert causal_window(mask, 1000) == window
