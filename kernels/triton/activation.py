"""SiLU and GELU of the gate, times up: one program has one row and a tile of its columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `manylora.kernels.reference_small.silu_mul`. Raises ValueError for a misfit."""
    return _run(gate_up, "silu")


def gelu_mul(gate_up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """See `manylora.kernels.reference_small.gelu_mul`. Raises ValueError for a misfit."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate: found {approximate!r}; wanted "none" or "tanh"')
    return _run(gate_up, "gelu" if approximate == "none" else "gelu_tanh")


def _run(gate_up: torch.Tensor, function: str) -> torch.Tensor:
    rows, width = gate_up.shape
    if width % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up: wanted [rows, 2 * n] with contiguous rows; "
            f"found {tuple(gate_up.shape)} {gate_up.stride()}"
        )
    n = width // 2
    out = torch.empty(rows, n, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _activate[(rows, triton.cdiv(n, _COLUMNS))](
            out, gate_up, gate_up.stride(0), n, FUNCTION=function, COLUMNS=_COLUMNS
        )
    return out


@triton.jit
def _activate(
    out: tl.tensor,
    gate_up: tl.tensor,
    stride: tl.tensor,
    n: tl.tensor,
    FUNCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = column < n
    gate = tl.load(gate_up + row * stride + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + n + column, mask=ok, other=0.0).to(tl.float32)
    if FUNCTION == "silu":
        share = _sigmoid(gate)
    elif FUNCTION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        share = _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * n + column, (gate * share * up).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x))
