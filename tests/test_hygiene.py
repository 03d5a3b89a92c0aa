"""The checkout itself: what imports what, what is pinned, what is linked."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import manylora

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "peft"}


def _python(code: str) -> str:
    """What `code` prints in a fresh interpreter started in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_our_folders_shadow_no_package() -> None:
    code = "import transformers; from transformers import AutoModelForCausalLM, Trainer; print(1)"
    assert _python(code) == "1\n"


@pytest.mark.parametrize(
    "module", ["manylora.client", "manylora.server.cli", "manylora.server.config"]
)
def test_light_modules_stay_light(module: str) -> None:
    loaded = _python(f"import sys, {module}; print(*sorted(sys.modules))").split()
    assert module in loaded
    assert not HEAVY & set(loaded)


def test_every_room_is_linked() -> None:
    links = {path.name: path for path in (ROOT / "manylora").iterdir() if path.is_symlink()}
    assert links.keys() >= {"server", "kernels", "adapters_store", "training", "client", "v1"}
    for name, path in links.items():
        assert not path.readlink().is_absolute(), name
        assert (path / "__init__.py").is_file(), name


def test_types_are_published() -> None:
    assert (ROOT / "manylora" / "py.typed").is_file()


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.partition("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}


def test_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    pins = _pins()
    for requirement in map(Requirement, wanted):
        if requirement.name != "manylora":
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), (requirement, version)


def test_changelog_has_this_version() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert any(line.startswith(f"## {manylora.__version__}") for line in lines)
