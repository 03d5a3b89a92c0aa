"""A plan as an operator takes it, words and three numbers, and back."""

from __future__ import annotations

import numpy as np
import torch

from manylora.kernels.backend import Backend, select
from manylora.kernels.plan import Plan


def backend_of(name: str, x: torch.Tensor) -> Backend:
    """The named backend, or the one for x's device if the name is empty."""
    return select(x.device, name or None)


def plan_of(words: torch.Tensor, edited: int, segments: int, max_slot: int) -> Plan:
    """The plan of `Plan.words`, on their own device; nothing is read from another one.

    The result lacks what a plan knows on the host, unless that is where the words are.
    """
    rows = len(words) - 4 - edited - (segments + 1) - segments
    sizes = [4, rows, edited, segments + 1, segments]
    _, row_slot, order, starts, slots = torch.split_with_sizes(words, sizes)
    on_host = words.device.type == "cpu"
    nothing = np.empty(0, np.int32)
    return Plan(
        rows=rows,
        edited=edited,
        segments=segments,
        row_slot=row_slot,
        order=order,
        seg_starts=starts,
        seg_slot=slots,
        words=words,
        slots=slots.numpy() if on_host else nothing,
        max_slot=max_slot,
        host_words=words.numpy() if on_host else nothing,
        address=words.data_ptr() if on_host else 0,
    )
