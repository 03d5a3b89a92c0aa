"""Imports from the server's own disks stay below the operator's roots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manylora.adapters_store.store import Store
from manylora.errors import InvalidArgument, ManyloraError, NotFound, PermissionDenied


@pytest.fixture
def roots(tmp_path: Path, write_checkpoint: Any) -> list[Path]:
    write_checkpoint(tmp_path / "root" / "team" / "adapter")
    write_checkpoint(tmp_path / "rootless", seed=1)
    write_checkpoint(tmp_path / "outside", seed=2)
    (tmp_path / "second").mkdir()
    return [tmp_path / "second", tmp_path / "root"]


def test_import(store: Store, roots: list[Path], tmp_path: Path) -> None:
    version = store.publish_below("a/b", str(tmp_path / "root/team/adapter"), roots, ["prod"])
    assert version.aliases == ("prod",)
    assert store.publish_below("a/b", f"{roots[1]}//team/./adapter/", roots) == version


@pytest.mark.usefixtures("roots")
def test_a_root_may_be_reached_by_a_link(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "root")
    for path in ("link/team/adapter", "root/team/adapter"):
        assert store.publish_below("a/b", str(tmp_path / path), [tmp_path / "link"]).version == 1


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("outside", PermissionDenied),
        ("rootless", PermissionDenied),
        ("root/../outside", InvalidArgument),
        ("root/team/../../outside", InvalidArgument),
        ("root/nowhere", NotFound),
        ("root/team/adapter/adapter_config.json", InvalidArgument),
        ("root", InvalidArgument),
        ("root/out", InvalidArgument),
        ("root/out/deep", InvalidArgument),
        ("root/loop", InvalidArgument),
        ("root/up/outside", InvalidArgument),
        ("root/x\0y", InvalidArgument),
        ("root/" + "x" * 300, InvalidArgument),
        ("root/\ud800", InvalidArgument),
        ("root/" + "x/" * 5000, InvalidArgument),
    ],
)
def test_paths_do_not_escape(
    store: Store, roots: list[Path], tmp_path: Path, path: str, error: type[ManyloraError]
) -> None:
    (tmp_path / "outside" / "deep").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "up").symlink_to("..")
    (tmp_path / "root" / "loop").symlink_to("loop")
    with pytest.raises(error):
        store.publish_below("a/b", f"{tmp_path}/{path}", roots)
    assert store.list().versions == ()


@pytest.mark.parametrize("path", ["", "root/team/adapter", "~/adapter", "file:///etc", "//", "/"])
def test_only_absolute_paths_below_a_root(store: Store, roots: list[Path], path: str) -> None:
    with pytest.raises((InvalidArgument, PermissionDenied)):
        store.publish_below("a/b", path, roots)


@pytest.mark.usefixtures("roots")
def test_no_roots_no_imports(store: Store, tmp_path: Path) -> None:
    with pytest.raises(PermissionDenied, match="imports are off"):
        store.publish_below("a/b", str(tmp_path / "root/team/adapter"), [])
    with pytest.raises(NotFound, match="cannot open the directory to import from"):
        store.publish_below("a/b", str(tmp_path / "gone/x"), [tmp_path / "gone"])


def test_linked_files_below_a_root(store: Store, roots: list[Path], tmp_path: Path) -> None:
    weights = tmp_path / "root/team/adapter/adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "outside/adapter_model.safetensors")
    with pytest.raises(InvalidArgument, match="links are not followed"):
        store.publish_below("a/b", str(weights.parent), roots)


def test_no_descriptor_leaks(store: Store, roots: list[Path], tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in ("root/team/adapter", "root/team/nowhere", "root/team", "outside"):
        try:
            store.publish_below("a/b", str(tmp_path / path), roots)
        except ManyloraError:
            continue
    assert len(list(Path("/proc/self/fd").iterdir())) == before
