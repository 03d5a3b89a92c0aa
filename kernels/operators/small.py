"""Operators of the small operations between the matrix products. They have no gradient."""

from __future__ import annotations

import torch

from manylora.kernels.operators.plan import backend_of


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    backend: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `manylora.kernels.reference_small.rms_norm`."""
    return _rms_norm(x, weight, eps, residual, offset, backend), x if residual is None else residual


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    backend: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `manylora.kernels.reference_small.layer_norm`."""
    return _layer_norm(x, weight, bias, eps, residual, backend), x if residual is None else residual


def silu_mul(gate_up: torch.Tensor, backend: str = "") -> torch.Tensor:
    """See `manylora.kernels.reference_small.silu_mul`."""
    result: torch.Tensor = _silu_mul(gate_up, backend)
    return result


def gelu_mul(gate_up: torch.Tensor, approximate: str = "none", backend: str = "") -> torch.Tensor:
    """See `manylora.kernels.reference_small.gelu_mul`."""
    result: torch.Tensor = _gelu_mul(gate_up, approximate, backend)
    return result


@torch.library.custom_op("manylora::rms_norm", mutates_args=("residual",))
def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    offset: float,
    backend: str,
) -> torch.Tensor:
    return backend_of(backend, x).rms_norm(x, weight, eps, residual, offset)[0].contiguous()


@torch.library.custom_op("manylora::layer_norm", mutates_args=("residual",))
def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    return backend_of(backend, x).layer_norm(x, weight, bias, eps, residual)[0].contiguous()


@torch.library.custom_op("manylora::silu_mul", mutates_args=())
def _silu_mul(gate_up: torch.Tensor, backend: str) -> torch.Tensor:
    return backend_of(backend, gate_up).silu_mul(gate_up).contiguous()


@torch.library.custom_op("manylora::gelu_mul", mutates_args=())
def _gelu_mul(gate_up: torch.Tensor, approximate: str, backend: str) -> torch.Tensor:
    return backend_of(backend, gate_up).gelu_mul(gate_up, approximate).contiguous()


@_rms_norm.register_fake
@_layer_norm.register_fake
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_silu_mul.register_fake
@_gelu_mul.register_fake
def _(gate_up: torch.Tensor, *_: object) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
