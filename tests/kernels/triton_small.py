"""Norms and activations in Triton's interpreter, against the reference.

Not collected by itself: test_triton.py runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import manylora.kernels.triton as kernels
from manylora.kernels import reference_small

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows with NaN between them."""
    wide = torch.full((rows, columns + 13), torch.nan, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    wide[:, 5 : 5 + columns] = 3 * torch.randn(rows, columns, generator=generator)
    return wide[:, 5 : 5 + columns]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    unit = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=unit, atol=unit)


@pytest.mark.parametrize("size", [1, 31, 576, 1100])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, size: int, with_residual: bool) -> None:
    x, weight = strided(3, size, dtype), strided(1, size, dtype, 1)[0]
    given = strided(3, size, dtype, 2) if with_residual else None
    wanted_residual = None if given is None else given.clone()
    found, h = kernels.rms_norm(x, weight, 1e-5, given, offset=1.0)
    wanted, wanted_h = reference_small.rms_norm(x, weight, 1e-5, wanted_residual, offset=1.0)
    assert h is (x if given is None else given)
    assert torch.equal(h, wanted_h)
    close(found, wanted)


@pytest.mark.parametrize("size", [1, 31, 576])
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm(dtype: torch.dtype, size: int, with_bias: bool) -> None:
    x, weight = strided(3, size, dtype), strided(1, size, dtype, 1)[0]
    bias = strided(1, size, dtype, 4)[0] if with_bias else None
    residual = strided(3, size, dtype, 2)
    wanted_residual = residual.clone()
    found, h = kernels.layer_norm(x, weight, bias, 1e-5, residual)
    wanted, wanted_h = reference_small.layer_norm(x, weight, bias, 1e-5, wanted_residual)
    assert h is residual and torch.equal(h, wanted_h)
    close(found, wanted)


@pytest.mark.parametrize("size", [1, 77, 1030])
@pytest.mark.parametrize(
    ("name", "options"),
    [("silu_mul", {}), ("gelu_mul", {}), ("gelu_mul", {"approximate": "tanh"})],
)
def test_activation(dtype: torch.dtype, size: int, name: str, options: dict[str, Any]) -> None:
    gate_up = strided(2, 2 * size, dtype)
    gate_up[0, 0], gate_up[1, 0] = 60.0, -60.0
    found = getattr(kernels, name)(gate_up, **options)
    close(found, getattr(reference_small, name)(gate_up, **options))


def test_no_rows() -> None:
    empty = torch.empty(0, 8)
    assert kernels.silu_mul(empty).shape == (0, 4)
    assert kernels.rms_norm(empty, torch.ones(8), 1e-5)[0].shape == (0, 8)


def test_misfits_are_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="norm: wanted"):
        kernels.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="norm: wanted"):
        kernels.layer_norm(x, torch.ones(8), None, 1e-5, torch.zeros(3, 8))
    with pytest.raises(ValueError, match="gate_up: wanted"):
        kernels.silu_mul(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="approximate: found"):
        kernels.gelu_mul(x, "sigmoid")
