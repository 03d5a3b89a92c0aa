"""Matrix products, and what their operands are rounded to."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda, is_hip_cdna3


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + left right: of one type as it is, float32 exactly; of float32 and a 16-bit type by
    tf32, which holds 16 bits, where the matrix units have it, else in float32."""
    exact: tl.constexpr = left.dtype == tl.float32 and right.dtype == tl.float32
    has_tf32: tl.constexpr = is_cuda() or is_hip_cdna3()
    precision: tl.constexpr = "tf32" if has_tf32 and not exact else "ieee"
    if left.dtype != right.dtype:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=precision)


@triton.jit
def narrow(h: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Rounded once to bfloat16 beside bfloat16; float16's range h may leave."""
    if dtype == tl.bfloat16:
        h = h.to(tl.bfloat16)
    return h
