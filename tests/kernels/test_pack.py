"""A and B packed in C++, against their layouts put together from slices, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, drawn

from manylora.kernels import Backend, cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())
SIZES = st.integers(0, 70) | st.sampled_from((127, 128, 129, 200))
EXCEPTION = np.dtype([("index", np.uint32), ("bits", np.uint16), ("unused", np.uint16)])
VIEWS = ("contiguous", "transposed", "every other", "odd start", "repeated")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def padded(matrix: torch.Tensor, lines: int, columns: int) -> torch.Tensor:
    """Zeros around it, up to multiples of lines and columns."""
    below, beside = -matrix.shape[0] % lines, -matrix.shape[1] % columns
    return torch.nn.functional.pad(matrix, (0, beside, 0, below))


def in_blocks(matrix: torch.Tensor, block: int, depth: int) -> torch.Tensor:
    """[columns / depth][lines][depth] for each block of lines, flat."""
    parts = [
        torch.stack(lines.split(depth, dim=1)).flatten() if lines.numel() else lines.flatten()
        for lines in matrix.split(block)
    ]
    return torch.cat(parts)


def layouts(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels/README.md has them."""
    a, b, depth = a.to(dtype), b.to(dtype), 2 if dtype == torch.bfloat16 else 1
    on_tiles = cpu.current_isa() == "amx" and dtype == torch.bfloat16
    packed_a = in_blocks(padded(a, 1, 2), 16, 2) if on_tiles else a.flatten()
    return packed_a, in_blocks(padded(b, 16, depth), 64, depth)


def plain(packed: torch.Tensor) -> torch.Tensor:
    """The elements of a compact tensor, as kernels/cpu/compact.h has it; any other as it is."""
    if cpu.current_isa() != "amx" or packed.dtype != torch.bfloat16:
        return packed
    words = packed.view(torch.int16).numpy().astype(np.uint16)
    count, exceptions = int(words[:4].view(np.int64)[0]), int(words[6:8].view(np.int32)[0])
    lowest = int(words[4:6].view(np.int32)[0])
    if exceptions < 0:
        return packed[32 : 32 + count]
    units = words[32 : 32 + -(-count // 128) * 96].reshape(-1, 3, 32)
    rows = np.arange(4)[None, :, None]
    byte = units[:, [0, 0, 1, 1]] >> 8 * (rows % 2) & 0xFF
    code = units[:, 2:3] >> 4 * rows & 15
    exponent = np.where(code == 0, 0, lowest + code - 1)
    elements = ((byte & 0x80) << 8 | exponent << 7 | byte & 0x7F).astype(np.uint16).flatten()
    for index, bits_of_it, _ in words[32 + units.size :].view(EXCEPTION)[:exceptions]:
        elements[index] = bits_of_it
    return torch.from_numpy(elements[:count].view(np.int16)).view(torch.bfloat16)


def viewed(values: torch.Tensor, how: str) -> torch.Tensor:
    """The same values, lying otherwise; repeated: those of the first row in each."""
    lines, columns = values.shape
    if how == "transposed":
        return values.T.contiguous().T
    if how == "every other":
        wider = values.new_full((2 * lines, 3 * columns), torch.nan)
        wider[::2, 1::3] = values
        return wider[::2, 1::3]
    if how == "odd start":
        return torch.cat([values.new_full((1,), torch.nan), values.flatten()])[1:].view(
            lines, columns
        )
    return values[:1].expand(lines, columns) if how == "repeated" and lines else values


@drawn(interpreted=1)
@given(data=st.data())
def test_packed_as_the_layouts_say(
    kernels: Backend, dtype: torch.dtype, data: st.DataObject
) -> None:
    rank, in_size, out = (data.draw(SIZES) for _ in range(3))
    source = data.draw(st.sampled_from((*DTYPES, torch.float64)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = 10.0 ** data.draw(st.integers(-42, 6))  # subnormal, and beyond what float16 holds
    a, b = (
        viewed(
            (size * torch.randn(shape, generator=random)).to(source),
            data.draw(st.sampled_from(VIEWS)),
        )
        for shape in ((rank, in_size), (out, rank))
    )
    wanted = layouts(a, b, dtype)
    found = kernels.pack_a(a, dtype), kernels.pack_b(b, dtype)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(bits(plain(got)), bits(want))


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(0, 255), st.sampled_from((0.0, 0.01, 1.0)), st.integers(0, 2**31))
def test_any_bits_survive(lines: int, columns: int, exponent: int, rare: float, seed: int) -> None:
    """Also NaN, infinity, -0 and what is subnormal, whether coded, listed behind, or left alone."""
    random = np.random.default_rng(seed)
    shape = (lines, columns)
    exponents = np.minimum(exponent + random.integers(0, 15, shape), 255)
    anywhere = random.random(shape) < rare
    exponents[anywhere] = random.integers(0, 256, shape)[anywhere]
    patterns = random.integers(0, 2, shape) << 15 | exponents << 7 | random.integers(0, 128, shape)
    factor = torch.from_numpy(patterns.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    wanted = layouts(factor, factor, torch.bfloat16)
    for pack, want in zip((cpu.pack_a, cpu.pack_b), wanted, strict=True):
        assert torch.equal(bits(plain(pack(factor, torch.bfloat16))), bits(want))


def test_a_factor_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        cpu.pack_factors([(torch.ones(2, 2, 1), torch.ones(2, 2))], torch.float32, 0)
