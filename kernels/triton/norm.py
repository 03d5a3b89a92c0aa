"""RMSNorm and LayerNorm after adding the residual: one program a row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.triton import tiles


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `manylora.kernels.reference_small.rms_norm`. Raises ValueError for a misfit."""
    return _run(x, weight, None, eps, residual, offset, mean=False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `manylora.kernels.reference_small.layer_norm`. Raises ValueError for a misfit."""
    return _run(x, weight, bias, eps, residual, 0.0, mean=True)


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    offset: float,
    *,
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = x.shape
    h = x if residual is None else residual
    if (
        x.stride(1) != 1
        or h.stride(1) != 1
        or h.shape != x.shape
        or weight.shape != (n,)
        or not (bias is None or bias.shape == (n,))
        or h.dtype != x.dtype
        or not weight.is_contiguous()
        or not (bias is None or bias.is_contiguous())
    ):
        raise ValueError(
            f"norm: wanted x, residual [rows, n] of one dtype and weight, bias [n], contiguous; "
            f"found x {tuple(x.shape)} {x.dtype}, residual {tuple(h.shape)} {h.dtype}, "
            f"weight {tuple(weight.shape)}"
        )
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows:
        size = tiles.power_of_two(n)
        _norm[(rows,)](
            out,
            x,
            residual,
            weight,
            bias,
            x.stride(0),
            h.stride(0),
            n,
            eps,
            offset,
            MEAN=mean,
            SIZE=size,
            num_warps=min(16, max(1, size // 512)),
        )
    return out, h


@triton.jit
def _norm(
    out: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    n: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    MEAN: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    ok = column < n
    h = tl.load(x + row * x_stride + column, mask=ok, other=0.0)
    if residual is not None:
        at = residual + row * residual_stride + column
        h = (h.to(tl.float32) + tl.load(at, mask=ok, other=0.0).to(tl.float32)).to(h.dtype)
        tl.store(at, h, mask=ok)
    wide = h.to(tl.float32)
    if MEAN:
        wide = tl.where(ok, wide - tl.sum(wide, 0) / n, 0.0)
    normed = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / n + eps))
    factor = tl.load(weight + column, mask=ok, other=0.0).to(tl.float32) + offset
    normed = normed * factor
    if bias is not None:
        normed += tl.load(bias + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * n + column, normed.to(out.dtype.element_ty), mask=ok)
