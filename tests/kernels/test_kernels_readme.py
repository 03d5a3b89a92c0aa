"""The examples of kernels/README.md run, and its list of files has every file."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from manylora.kernels import cpu

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
README = (KERNELS / "README.md").read_text()


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_unavailable())
def test_examples(tmp_path: Path) -> None:
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    assert program.count("assert") == 4
    command = [sys.executable, "-c", "import torch; torch.manual_seed(0)\n" + program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_is_listed() -> None:
    listed = re.findall(r"`([\w/*.]+)`", README.split("## Files")[1].split("Tests:")[0])
    patterns = [name + "*" if name.endswith("/") else name for name in listed]
    kinds = ("*.py", "*.cpp", "*.h")
    files = [path.relative_to(KERNELS).as_posix() for kind in kinds for path in KERNELS.rglob(kind)]
    for file in files:
        if not file.endswith("__init__.py"):
            assert any(fnmatch(file, pattern) for pattern in patterns), file
    for pattern in patterns:
        assert any(fnmatch(file, pattern) for file in files), pattern
