"""Makes bfloat16 right in Triton's interpreter (of 3.7.1: it uses names that are private there).

As it comes, the interpreter keeps bfloat16 as uint16 and multiplies the raw bits in `tl.dot`, and
cuts floats off instead of rounding them. Here operations on bfloat16 work on float32 and round to
nearest. It also leaves `tl.dot` to a BLAS, of which some sum a row otherwise where it stands
elsewhere in a tile; no GPU does. Here all rows are summed alike. `test_triton.py` has canaries that
fail should another version need other names.

Import it before any kernel, in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
_COMPARISONS = {
    np.equal,
    np.not_equal,
    np.less,
    np.less_equal,
    np.greater,
    np.greater_equal,
}
_CASTS = ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp")


def _up(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _down(values: np.ndarray) -> np.ndarray:
    floats = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    return floats.to(torch.bfloat16).view(torch.uint16).numpy()


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    return Handle(_up(handle.data), tl.float32) if _is_bf16(handle) else handle


def install() -> None:
    """Patches the interpreter's builder, once."""
    binary_op, cast_impl = Builder.binary_op, Builder.cast_impl
    fp_to_fp = Builder.create_fp_to_fp

    def patched_binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary_op(self, left, right, op)
        result = op(_up(left.data), _up(right.data))
        if op in _COMPARISONS:
            return Handle(result, tl.int1)
        return Handle(_down(result), tl.bfloat16)

    def patched_cast(self: Any, source: Any, wanted: Any) -> Any:
        if _is_bf16(source) and wanted.scalar != tl.bfloat16:
            wide = _wide(source)
            return wide if wanted.scalar == tl.float32 else cast_impl(self, wide, wanted)
        if wanted.scalar == tl.bfloat16 and not _is_bf16(source):
            return Handle(_down(source.data), tl.bfloat16)
        return cast_impl(self, source, wanted)

    def patched_dot(_self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = (_wide(x).data.astype(d.data.dtype) for x in (a, b))
        return Handle(np.einsum("ik,kj->ij", left, right) + d.data, d.dtype.scalar)

    def patched_fp_to_fp(self: Any, source: Any, wanted: Any, rounding: Any) -> Any:
        if wanted.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return Handle(_down(source.data), tl.bfloat16)
        return fp_to_fp(self, source, wanted, rounding)

    Builder.binary_op = patched_binary_op
    Builder.cast_impl = patched_cast
    Builder.create_dot = patched_dot
    Builder.create_fp_to_fp = patched_fp_to_fp
    for name in _CASTS:
        setattr(Builder, name, patched_cast)
    Builder.get_bf16 = lambda _, value: Handle(_down(np.array([value])), tl.bfloat16)
