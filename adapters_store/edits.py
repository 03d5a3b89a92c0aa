"""What an adapter does to the base, lowered to a few primitives.

For each row of a step, by that row's adapter (DESIGN.md, 'Edits'):

    y = out_scale ∘ (W (in_scale ∘ x) + b) + scale · B (A x) + bias

where W and b are the base's, or the adapter's own; and on an embedding, whose x is a token id:

    y = (E[x] + scale · B A[:, x]) · the module's own factor, if it has one (Gemma)

where E is the base's table, or one whose rows the adapter replaces, some or all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from manylora.adapters_store.head import Head


class ModuleKind(Enum):
    """What kind of base module an edit lands on."""

    LINEAR = "linear"  # weight [out, in]
    CONV1D = "conv1d"  # weight [in, out], GPT-2's; peft's fan_in_fan_out
    QUANTISED = "quantised"  # LINEAR of bitsandbytes, weight dequantised on demand
    EMBEDDING = "embedding"  # weight [vocab, hidden]: in_size vocab, out_size hidden
    NORM = "norm"  # weight [n], and [n] a bias where the module has one: in_size = out_size = n


@dataclass(slots=True, frozen=True)
class ModuleShape:
    """One adaptable place of the base: y [rows, out_size] = module(x [rows, in_size]).

    tied: whether its weight is the input embedding's own.
    """

    kind: ModuleKind
    in_size: int
    out_size: int
    tied: bool = False


@dataclass(slots=True)
class ModuleEdit:
    """One module's edit; tensors on the host, any float dtype.

    a: [rank, in_size], b: [out_size, rank] (both or neither), scale: the factor of B A x;
    on_gather: the module is an embedding, so that A x is a column of A; in_scale: [in_size];
    out_scale, bias: [out_size].
    weight, own_bias: in the place of the base's own parameters, in their shapes and dtypes, but
    weight [out_size, in_size] for CONV1D, too.
    token_ids: int64 [n], ascending, which rows of an embedding's or a head's weight are replaced;
    token_rows: [n, hidden], by what, dtype as there.
    An embedding has only a, b and scale, weight, token_ids and token_rows; a norm weight and
    own_bias.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    on_gather: bool = False
    in_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    own_bias: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    token_rows: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


@dataclass(slots=True)
class LoweredAdapter:
    """One adapter, lowered: edits by module name as in the base's own module tree
    ("model.layers.0.self_attn.q_proj"); modules left alone are absent.

    What comes before every prompt, one of the two at most; any float dtype. virtual_tokens:
    [tokens, embedding width], in the place of embedded tokens. prefix: [tokens, layers, 2,
    kv_heads * head_dim], keys and values as attention sees them.
    head: of an adapter that does not continue text; its own checks against the base come later.
    invocation: token ids from whose last occurrence in a prompt on the edits apply; none: always.
    """

    edits: Mapping[str, ModuleEdit]
    virtual_tokens: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    head: Head | None = None
    invocation: tuple[int, ...] = ()
