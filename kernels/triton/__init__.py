"""The kernels for GPUs, in Triton, behind the same functions as `manylora.kernels.reference`.

Plan, table and batch are tensors on the device; nothing is read back to the host, and there are no
float atomics. On tensors of the CPU the kernels run in Triton's interpreter, where the environment
variable TRITON_INTERPRET is 1 when this package is first imported.
"""

from __future__ import annotations

from manylora.kernels.triton.activation import gelu_mul, silu_mul
from manylora.kernels.triton.attention import paged_attention
from manylora.kernels.triton.edits import apply_edits_, pack_a, pack_b, pack_factors
from manylora.kernels.triton.norm import layer_norm, rms_norm
from manylora.kernels.triton.product import linear_with_edits
from manylora.kernels.triton.scale_inputs import scale_inputs
from manylora.kernels.triton.training import add_low_rank_, low_rank_backward_
from manylora.kernels.triton.write_kv import rotary_write_kv, write_kv

__all__ = [
    "NAME",
    "add_low_rank_",
    "apply_edits_",
    "gelu_mul",
    "layer_norm",
    "linear_with_edits",
    "low_rank_backward_",
    "pack_a",
    "pack_b",
    "pack_factors",
    "paged_attention",
    "rms_norm",
    "rotary_write_kv",
    "scale_inputs",
    "silu_mul",
    "write_kv",
]

NAME = "triton"
