"""The Triton kernels: run in the interpreter, and compiled ahead for GPUs that are not here.

The interpreter patches Triton for a whole process and is chosen when kernels are first imported,
so those tests are files of their own, run by pytest in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter"
    ),
    pytest.mark.slow,
]


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("file", "only"),
    [
        ("triton_shim.py", ""),
        ("test_edits.py", "triton"),
        ("triton_attention.py", ""),
        ("triton_small.py", ""),
    ],
)
def test_in_the_interpreter(file: str, only: str) -> None:
    pytest_run = ["-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    out = run(
        [*pytest_run, str(HERE / file), "-q", "-x", "-k", only, "-p", "no:cacheprovider"],
        TRITON_INTERPRET="1",
    )
    assert " passed" in out


def test_compiled_ahead(tmp_path: Path) -> None:
    """A part of what `python -m manylora.kernels.triton.compile_check` does whole."""
    part = ["--models", "llama-3-8b", "--dtypes", "bf16", "--targets", "cuda:90"]
    out = run(
        ["-m", "manylora.kernels.triton.compile_check", *part],
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert " 0 that do not fit" in out
    for kernel in ("shrink", "expand", "attend", "combine", "write_kv", "norm", "activate"):
        assert f"\n{kernel} " in out
