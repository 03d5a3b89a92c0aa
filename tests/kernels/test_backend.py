"""Which backend serves, and the C++ library's choice of ISA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manylora import kernels
from manylora.kernels import cpu

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
LIBRARY = Path(cpu.__file__).with_name("libmanylora_cpu.so")


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    found = os.environ | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=found, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_library_is_built() -> None:
    assert cpu.available(), cpu.why_unavailable()
    assert kernels.select("cpu") is cpu
    assert kernels.select("cpu", "cpu") is cpu
    assert cpu.isas()[0] == "generic"


def test_the_reference_only_stands_in_where_no_name_was_given() -> None:
    assert kernels.select("cpu", "reference").NAME == "reference"
    with pytest.raises(ValueError, match="wanted one of reference, cpu, triton"):
        kernels.select("cpu", "cuda")


def test_isa_can_be_forced() -> None:
    before = cpu.current_isa()
    try:
        for isa in cpu.isas():
            cpu.set_isa(isa)
            assert cpu.current_isa() == isa
        with pytest.raises(ValueError, match="found 'sse9'; wanted one of generic"):
            cpu.set_isa("sse9")
    finally:
        cpu.set_isa(before)


def test_isa_follows_the_environment(tmp_path: Path) -> None:
    code = "from manylora.kernels import cpu; print(cpu.current_isa())"
    assert run(code, tmp_path, MANYLORA_ISA="generic").stdout.strip() == "generic"
    assert "found 'sse9'" in run(code, tmp_path, MANYLORA_ISA="sse9").stderr


def test_without_the_library_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    package = tmp_path / "manylora"
    shutil.copytree(
        Path(kernels.__file__).parent,
        package / "kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    (package / "__init__.py").touch()
    code = (
        "import sys\n"  # an editable install's finder would be asked before the path
        "sys.meta_path = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]\n"
        "from manylora import kernels\n"
        "print(kernels.__file__, kernels.select('cpu').NAME, kernels.select('cpu').NAME)\n"
        "try: kernels.select('cpu', 'cpu')\n"
        "except ValueError as error: print(error)\n"
    )
    found = run(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert f"{package}/kernels/__init__.py reference reference\n" in found.stdout
    assert "'cpu' cannot be used here: the C++ kernels were not built" in found.stdout
    assert found.stderr.count("RuntimeWarning: the fast 'cpu' kernels are missing") == 1


@needs_nm
def test_no_code_is_shared_between_isas() -> None:
    """A function merged by the linker could be the AVX-512 copy, run on a machine without it."""
    symbols = subprocess.run(["nm", "-C", LIBRARY], capture_output=True, text=True, check=True)
    merged = [line for line in symbols.stdout.splitlines() if line[17:18] in "WVu"]
    assert not merged


@needs_nm
def test_the_library_needs_only_libc() -> None:
    symbols = subprocess.run(["nm", "-D", LIBRARY], capture_output=True, text=True, check=True)
    wanted = [line.split()[-1] for line in symbols.stdout.splitlines() if line[17:18] == "U"]
    assert wanted
    assert all("@GLIBC_" in symbol for symbol in wanted), wanted
