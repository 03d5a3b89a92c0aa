"""Every served PEFT method equals peft, on every architecture, all in one mixed batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from manylora_testing.encoder_column import (
    ENCODER,
    encoder_errors,
    encoder_gaps,
    make_encoder_column,
    run_encoder_column,
)
from manylora_testing.matrix import DECODERS, TOLERANCE, errors, gaps, make_column, run_column
from manylora_testing.methods import methods_of
from manylora_testing.models import PACKED
from safetensors.torch import load_file, save_file

from manylora.kernels import cpu

WEIGHTS = "adapter_model.safetensors"
CASES = [
    *(("cpu", arch, True) for arch in DECODERS),
    ("reference", "gpt2", True),
    ("reference", "llama", False),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "arch", "fused"), CASES)
def test_methods_equal_peft(backend: str, arch: str, fused: bool, tmp_path: Path) -> None:
    if backend == "cpu" and not cpu.available():
        pytest.skip(cpu.why_unavailable())
    column = make_column(arch, tmp_path)
    check(arch, gaps(column, run_column(column, backend=backend, fused=fused)))


@pytest.mark.filterwarnings("ignore")
async def test_classifiers_of_an_encoder_equal_peft(tmp_path: Path) -> None:
    column = make_encoder_column(tmp_path)
    asked, together = await run_encoder_column(column)
    assert together == len(asked)
    check(ENCODER, encoder_gaps(column, asked))


def check(arch: str, found: Mapping[str, tuple[float, float]]) -> None:
    """found: of `gaps`."""
    assert set(found) == {"base", *methods_of(arch)}
    wrong = {method: gap for method, (gap, _) in found.items() if not gap < TOLERANCE}
    assert not wrong
    # the comparison has teeth: every adapter moves the logits by far more
    idle = {method: size for method, (_, size) in found.items() if size < 100 * TOLERANCE}
    assert set(idle) == {"base"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float16)], ids=str
)
def test_sixteen_bit_files_equal_peft(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Adapters saved in 16 bits, on a base in float32. (Where they bring a copy of the base's own
    weights, that would be another base.)"""
    if not cpu.available():
        pytest.skip(cpu.why_unavailable())
    column = make_column(arch, tmp_path)
    halved = {}
    for method, directory in column.adapters.items():
        tensors = load_file(directory / WEIGHTS)
        if not any("base_layer" in name for name in tensors):
            save_file({n: t.to(dtype) for n, t in tensors.items()}, directory / WEIGHTS)
            halved[method] = directory
    assert len(halved) > 30
    column = replace(column, adapters=halved)
    found = gaps(column, run_column(column))
    assert not {method: gap for method, (gap, _) in found.items() if not gap < TOLERANCE}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_no_worse_than_pefts_own_bfloat16(arch: str, tmp_path: Path) -> None:
    """Against float32, over all methods; a single one's few rows are noise."""
    if not cpu.available():
        pytest.skip(cpu.why_unavailable())
    column = make_column(arch, tmp_path, torch.bfloat16, **(PACKED if arch == "llama" else {}))
    found = errors(column, run_column(column, dtype="bfloat16"))
    ratios = {method: ours / theirs for method, (ours, theirs) in found.items()}
    assert sum(ratios.values()) / len(ratios) < 1.05, ratios
    assert max(ratios.values()) < 1.5, ratios


@pytest.mark.filterwarnings("ignore")
async def test_an_encoder_is_no_worse_than_pefts_own_bfloat16(tmp_path: Path) -> None:
    column = make_encoder_column(tmp_path, torch.bfloat16)
    asked, _ = await run_encoder_column(column, "bfloat16", prompts_each=2)
    ours, theirs = encoder_errors(column, asked)
    assert ours < 1.05 * theirs, (ours, theirs)
