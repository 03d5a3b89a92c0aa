"""The Triton kernels: run in the interpreter, and compiled ahead for GPUs that are not here.

The interpreter patches Triton for a whole process and is chosen when kernels are first imported,
so those tests are files of their own, run by pytest in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = "\n".join(path.read_text() for path in (HERE.parents[1] / "kernels/triton").glob("*.py"))
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


def interpreted(*files: str, only: str = "") -> None:
    """Runs tests in the interpreter."""
    start = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    paths = [str(HERE / file) for file in files]
    options = ["-q", "-x", "-k", only, "-p", "no:cacheprovider"]
    assert " passed" in run(["-c", start, *paths, *options], TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "files",
    [("edits",), ("attention", "small"), ("training", "operators")],
    ids=" and ".join,
)
def test_all_backends_cases_in_the_interpreter(files: tuple[str, ...]) -> None:
    """What the other backends go through, too."""
    interpreted(*(f"test_{file}.py" for file in files), only="triton")


def test_what_only_triton_has_in_the_interpreter() -> None:
    interpreted("triton_shim.py", "triton_attention.py", "triton_product.py")


def test_engine_in_the_interpreter() -> None:
    interpreted("triton_engine.py", "triton_capture.py")


def test_the_check_ahead_finds_what_does_not_fit(tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider"]
    start = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = ["-c", start, str(HERE / "triton_misfits.py"), *options]
    assert " passed" in run(command, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize(
    ("model", "dtype", "target"),
    [
        ("llama-3-8b", "bf16", "cuda:90"),
        ("qwen-2.5-0.5b", "fp16", "cuda:80"),
        ("llama-3-8b", "fp16", "cuda:100"),
        ("qwen-2.5-0.5b", "bf16", "cuda:120"),
        ("qwen-2.5-0.5b", "fp16", "hip:gfx942"),
    ],
)
def test_compiled_ahead(model: str, dtype: str, target: str, tmp_path: Path) -> None:
    """Every kernel for every target; `make check-gpu-kernels` compiles all combinations."""
    part = ["--models", model, "--dtypes", dtype, "--targets", target]
    out = run(
        ["-m", "manylora.kernels.triton.compile_check", *part],
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert " 0 that do not fit" in out
    launched = set(re.findall(r"^ +_(\w+)\[", SOURCES, re.MULTILINE))
    assert {"shrink", "expand", "product", "attend", "gradient"} <= launched
    assert {line.split()[0] for line in out.splitlines() if f" {target} " in line} == launched
