"""Every served PEFT method equals peft, on every architecture, all in one mixed batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manylora_testing.matrix import TOLERANCE, run_column
from manylora_testing.methods import PLACES, methods_of

from manylora.kernels import cpu

CASES = [
    *(("cpu", arch, True) for arch in PLACES),
    ("reference", "gpt2", True),
    ("reference", "llama", False),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "arch", "fused"), CASES)
def test_methods_equal_peft(backend: str, arch: str, fused: bool, tmp_path: Path) -> None:
    if backend == "cpu" and not cpu.available():
        pytest.skip(cpu.why_unavailable())
    torch.manual_seed(3)  # peft's initial weights
    found = run_column(arch, tmp_path, backend=backend, fused=fused)
    assert set(found) == {"base", *methods_of(arch)}
    wrong = {method: gap for method, (gap, _) in found.items() if gap >= TOLERANCE}
    assert not wrong
    # the comparison has teeth: every adapter moves the logits by far more
    idle = {method: size for method, (_, size) in found.items() if size < 100 * TOLERANCE}
    assert set(idle) == {"base"}
