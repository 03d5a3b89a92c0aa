"""The C++ kernels for CPUs, behind the same functions as `manylora.kernels.reference`."""

from __future__ import annotations

from manylora.kernels.cpu.attention import paged_attention, write_kv
from manylora.kernels.cpu.edits import apply_edits_, pack_b, packed_b_numel, scale_inputs
from manylora.kernels.cpu.library import available, current_isa, isas, set_isa, why_unavailable

__all__ = [
    "NAME",
    "apply_edits_",
    "available",
    "current_isa",
    "isas",
    "pack_b",
    "packed_b_numel",
    "paged_attention",
    "scale_inputs",
    "set_isa",
    "why_unavailable",
    "write_kv",
]

NAME = "cpu"
