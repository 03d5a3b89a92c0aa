"""The generic kernels compile for another processor, where this machine has a compiler for one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "kernels/cpu"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
)
DEFINES = ("-DMANYLORA_ISA=generic",)


@pytest.mark.skipif(COMPILER is None, reason="aarch64-linux-gnu-g++ is not installed")
@pytest.mark.slow
def test_for_aarch64(tmp_path: Path) -> None:
    """One library of all sources: what is not there, or only there for x86, does not link."""
    assert COMPILER is not None
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    command = [COMPILER, *FLAGS, *DEFINES, "-shared", "-Wl,-z,defs", "-o", str(tmp_path / "lib.so")]
    done = subprocess.run([*command, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
