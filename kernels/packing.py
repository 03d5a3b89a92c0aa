"""Many factors packed into one buffer, for backends without a call of their own for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

_LINE = 64  # bytes

_Pack = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


def packed_in_turn(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
    before: int,
    pack_a: _Pack,
    pack_b: _Pack,
) -> tuple[torch.Tensor, np.ndarray]:
    """See `manylora.kernels.reference.pack_factors`."""
    line = _LINE // dtype.itemsize
    parts, starts = [torch.zeros(-(-before // line) * line, dtype=dtype)], []
    end = len(parts[0])
    for a, b in factors:
        for packed in (pack_a(a, dtype), pack_b(b, dtype)):
            starts.append(end)
            parts.append(torch.nn.functional.pad(packed, (0, -len(packed) % line)))
            end += len(parts[-1])
    return torch.cat(parts), np.array(starts, np.int64).reshape(-1, 2)
