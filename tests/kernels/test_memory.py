from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from manylora import kernels
from manylora.kernels import cpu


def test_zeros_at_the_beginning_of_a_huge_page() -> None:
    found = cpu.huge_empty([3, 1000], torch.bfloat16)
    assert found.shape == (3, 1000)
    assert found.data_ptr() % (2 << 20) == 0
    assert not found.any()
    assert cpu.huge_empty([0], torch.float32).numel() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_of_the_kind_that_gets_huge_pages() -> None:
    """That is, private: what shared memory gets is another setting, and usually "never"."""
    tensor = cpu.huge_empty([8 << 20], torch.uint8)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= tensor.data_ptr() < end:
            assert permissions == "rw-p"
            return
    raise AssertionError("the tensor is nowhere")


def test_side_by_side() -> None:
    shapes = [(3, 5), (0,), (7,), (2, 1, 4)]
    tensors = kernels.side_by_side(shapes, torch.bfloat16, torch.device("cpu"))
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))
