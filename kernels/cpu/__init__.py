"""The C++ kernels for CPUs, behind the same functions as `manylora.kernels.reference`."""

from __future__ import annotations

from manylora.kernels.cpu.attention import paged_attention, write_kv
from manylora.kernels.cpu.decoder import DecoderLayer, DecoderLayers, DecoderProjection
from manylora.kernels.cpu.edits import apply_edits_, scale_inputs
from manylora.kernels.cpu.library import available, current_isa, isas, set_isa, why_unavailable
from manylora.kernels.cpu.memory import HugeArena, huge_empty
from manylora.kernels.cpu.pack import pack_a, pack_b, pack_factors
from manylora.kernels.cpu.product import PackedWeight, linear, packs
from manylora.kernels.cpu.small import gelu_mul, layer_norm, rms_norm, rotary_write_kv, silu_mul
from manylora.kernels.cpu.training import add_low_rank_, low_rank_backward_

__all__ = [
    "NAME",
    "DecoderLayer",
    "DecoderLayers",
    "DecoderProjection",
    "HugeArena",
    "PackedWeight",
    "add_low_rank_",
    "apply_edits_",
    "available",
    "current_isa",
    "gelu_mul",
    "huge_empty",
    "isas",
    "layer_norm",
    "linear",
    "low_rank_backward_",
    "pack_a",
    "pack_b",
    "pack_factors",
    "packs",
    "paged_attention",
    "rms_norm",
    "rotary_write_kv",
    "scale_inputs",
    "set_isa",
    "silu_mul",
    "why_unavailable",
    "write_kv",
]

NAME = "cpu"
