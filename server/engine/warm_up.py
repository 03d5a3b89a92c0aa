"""Before the first request: the kernels of a decoder's step, which are compiled on first use, are
compiled, since a compiler at work would hold up everybody."""

from __future__ import annotations

import numpy as np
import torch

from manylora.kernels import make_batch, make_plan
from manylora.kernels.attention import row_positions
from manylora.server.engine.model import AdaptedModel, StepInputs

_WIDE = 1024  # positions of the block table: a decode over so many is split, and summed
_ALIGNED = 64  # elements that an adapter's tensor may be padded to


@torch.inference_mode()
def warm_up(model: AdaptedModel, block_size: int) -> None:
    """Runs a step with a decode and a prefill chunk, edited by an adapter of zeros in slot 0 if the
    pool has room for one. Before any adapter is placed. What only IA³ needs is left to its first
    request."""
    step, modules = model.step, len(model.modules)
    room = max(max(s.in_size, s.out_size) for s in model.modules.values()) + _ALIGNED
    if step.pool.numel() < room:
        model.forward(_inputs(block_size, -1, model.device))
        return
    step.pool[:room] = 0
    offsets = np.full((modules, 5), -1, np.int64)
    offsets[:, :2] = 0
    step.table.write(0, np.ones(modules, np.int32), np.ones(modules, np.float32), offsets)
    model.forward(_inputs(block_size, 0, model.device))
    step.table.clear(0)


def _inputs(block_size: int, slot: int, device: torch.device) -> StepInputs:
    """A sequence with one row and one with two, from their start, in block 0."""
    counts = np.array([1, 2], np.int32)
    slots = np.full(3, slot, np.int32)
    blocks = np.zeros((2, -(-_WIDE // block_size)), np.int32)
    return StepInputs(
        token_ids=torch.zeros(3, dtype=torch.int64, device=device),
        positions=torch.from_numpy(row_positions(counts, counts)).to(device),
        plan=make_plan(slots, device),
        head_plan=make_plan(slots[:2], device),
        attention=make_batch(counts, counts, blocks, block_size, device),
        sample_rows=torch.tensor([0, 2], device=device),
    )
