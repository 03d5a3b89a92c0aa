"""The kernels as torch custom operators, for `torch.compile`, `torch.export` and autograd.

Each function here takes what the backends' function of that name takes, and calls it through an
operator `torch.ops.manylora.…`, whose arguments are tensors and numbers. `backend` names one of
`manylora.kernels.BACKENDS`; without it the tensors' device decides, as in `select`.

An operator costs 10 µs and more a call: what needs no tracing calls the backend itself.
"""

from __future__ import annotations

from manylora.kernels.operators.attention import paged_attention, rotary_write_kv, write_kv
from manylora.kernels.operators.edits import apply_edits_
from manylora.kernels.operators.small import gelu_mul, layer_norm, rms_norm, silu_mul
from manylora.kernels.operators.training import add_low_rank

__all__ = [
    "add_low_rank",
    "apply_edits_",
    "gelu_mul",
    "layer_norm",
    "paged_attention",
    "rms_norm",
    "rotary_write_kv",
    "silu_mul",
    "write_kv",
]
