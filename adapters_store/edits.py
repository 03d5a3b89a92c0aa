"""What an adapter does to the base, lowered to a few primitives.

For each row of a step, by that row's adapter (DESIGN.md, 'Edits'):

    y = out_scale ∘ (W (in_scale ∘ x) + b) + scale · B (A x) + bias
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch


class ModuleKind(Enum):
    """What kind of base module an edit lands on."""

    LINEAR = "linear"  # weight [out, in]
    CONV1D = "conv1d"  # weight [in, out], GPT-2's; peft's fan_in_fan_out
    EMBEDDING = "embedding"  # weight [vocab, hidden]


@dataclass(slots=True, frozen=True)
class ModuleShape:
    """One adaptable place of the base: y [rows, out_size] = module(x [rows, in_size])."""

    kind: ModuleKind
    in_size: int
    out_size: int


@dataclass(slots=True)
class ModuleEdit:
    """One module's edit; tensors on the host, any float dtype.

    a: [rank, in_size], b: [out_size, rank] (both or neither), scale: the factor of B A x;
    in_scale: [in_size]; out_scale, bias: [out_size].
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    in_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


@dataclass(slots=True)
class LoweredAdapter:
    """One adapter, lowered: edits by module name as in the base's own module tree
    ("model.layers.0.self_attn.q_proj"); modules left alone are absent."""

    edits: Mapping[str, ModuleEdit]
