"""Names, versions, aliases and the checkpoints behind them."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters_store.limits import Limits
from manylora.adapters_store.store import Store
from manylora.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    ManyloraError,
    NotFound,
    ResourceExhausted,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapters(tmp_path: Path, write_checkpoint: Any) -> Callable[[int], Path]:
    return lambda seed: write_checkpoint(tmp_path / f"adapter-{seed}", seed=seed)


def snapshot(root: Path) -> set[tuple[str, int]]:
    """Every file of the store but SQLite's own, with its size."""
    files = (path for path in root.rglob("*") if path.is_file() and "store.db" not in path.name)
    return {(str(path.relative_to(root)), path.stat().st_size) for path in files}


def test_publish_and_read_back(store: Store, tmp_path: Path, adapters: Any) -> None:
    before = datetime.now(UTC)
    (adapters(1) / "README.md").write_text("not kept")
    version = store.publish("acme/tickets", adapters(1), ["prod"])
    assert (version.label, version.peft_type, version.rank) == ("acme/tickets@1", "LORA", 4)
    assert version.aliases == ("prod",)
    assert before <= version.created <= datetime.now(UTC)
    path = store.open_object(version.digest)
    assert {file.name for file in path.iterdir()} == {CONFIG, WEIGHTS}
    for name in (CONFIG, WEIGHTS):
        assert (path / name).read_bytes() == (adapters(1) / name).read_bytes()
    assert version.size_bytes == sum(file.stat().st_size for file in path.iterdir())
    for ref in ("acme/tickets", "acme/tickets@1", "acme/tickets:prod", "acme/tickets:latest"):
        assert store.resolve(ref) == version
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_digest_is_what_sha256sum_says(store: Store, adapters: Any) -> None:
    version = store.publish("acme/tickets", adapters(1))
    listing = subprocess.run(
        ["sha256sum", CONFIG, WEIGHTS], cwd=adapters(1), check=True, capture_output=True
    ).stdout
    assert version.digest == hashlib.sha256(listing).hexdigest()


def test_versions_and_aliases_move_forward(store: Store, adapters: Any) -> None:
    first = store.publish("acme/tickets", adapters(1), ["prod"])
    second = store.publish("acme/tickets", adapters(2), ["canary"])
    assert [v.version for v in store.versions("acme/tickets")] == [1, 2]
    assert store.resolve("acme/tickets").digest == second.digest
    assert store.resolve("acme/tickets:prod").digest == first.digest
    moved = store.set_alias("acme/tickets:canary", "prod")
    assert (moved.version, moved.aliases) == (2, ("canary", "prod"))
    assert store.resolve("acme/tickets@1").aliases == ()


def test_the_newest_content_again_is_no_new_version(store: Store, adapters: Any) -> None:
    first = store.publish("acme/tickets", adapters(1))
    again = store.publish("acme/tickets", adapters(1), ["prod"])
    assert (again.version, again.aliases) == (1, ("prod",))
    store.publish("acme/tickets", adapters(2))
    back = store.publish("acme/tickets", adapters(1))
    assert (back.version, back.digest) == (3, first.digest)
    assert store.publish("other/name", adapters(1)).digest == first.digest


def test_numbers_are_never_used_again(store: Store, adapters: Any) -> None:
    for seed in (1, 2):
        store.publish("acme/tickets", adapters(seed))
    store.delete("acme/tickets@2")
    assert store.publish("acme/tickets", adapters(3)).version == 3
    store.delete("acme/tickets")
    assert store.publish("acme/tickets", adapters(1)).version == 4


def test_delete(store: Store, tmp_path: Path, adapters: Any, assert_whole: Any) -> None:
    shared = store.publish("acme/tickets", adapters(1))
    store.publish("beta/tickets", adapters(1))
    second = store.publish("acme/tickets", adapters(2), ["prod"])
    with pytest.raises(FailedPrecondition, match="acme/tickets@2 is prod"):
        store.delete("acme/tickets@2")
    for alias in ("prod", "latest"):
        with pytest.raises(InvalidArgument, match="cannot delete by alias"):
            store.delete(f"acme/tickets:{alias}")
    assert [v.version for v in store.delete("acme/tickets")] == [1, 2]
    for ref in ("acme/tickets", "acme/tickets@1", "acme/tickets:prod"):
        with pytest.raises(NotFound):
            store.resolve(ref)
        with pytest.raises(NotFound):
            store.delete(ref if ":" not in ref else "acme/tickets")
    assert store.open_object(shared.digest).is_dir()  # beta's, too
    with pytest.raises(NotFound):
        store.open_object(second.digest)
    store.close()
    assert_whole(tmp_path / "store")


def test_not_found_and_malformed(store: Store, adapters: Any) -> None:
    store.publish("acme/tickets", adapters(1))
    with pytest.raises(NotFound, match="no such adapter; found acme/other"):
        store.resolve("acme/other")
    for ref in ("acme/tickets@2", "acme/tickets:prod"):
        with pytest.raises(NotFound, match="no such version or alias"):
            store.resolve(ref)
        with pytest.raises(NotFound):
            store.set_alias(ref, "canary")
    with pytest.raises(NotFound):
        store.versions("acme/other")
    with pytest.raises(NotFound):
        store.open_object("0" * 64)
    for digest in ("", "../../etc", "0" * 63, "A" * 64):
        with pytest.raises(InvalidArgument):
            store.open_object(digest)
    for bad in ("acme", "../x/y", "acme/tickets@0", "acme/" + "x" * 10_240, "acme/tіckets"):
        for call in (store.resolve, store.delete, lambda name: store.set_alias(name, "prod")):
            with pytest.raises(InvalidArgument):
                call(bad)
    with pytest.raises(InvalidArgument, match="alias"):
        store.set_alias("acme/tickets", "latest")


def test_list_pages(store: Store, adapters: Any) -> None:
    names = [f"{tenant}/a{i}" for tenant in ("acme", "beta", "zeta") for i in range(3)]
    for name in reversed(names):
        store.publish(name, adapters(1))
    store.publish("acme/a0", adapters(2))

    def listed(tenant: str | None, size: int) -> list[str]:
        found, token = [], ""
        while True:
            page = store.list(tenant, size, token)
            assert 0 < len(page.versions) <= size
            found += [version.label for version in page.versions]
            if not (token := page.next_page_token):
                return found

    everything = [f"{name}@{2 if name == 'acme/a0' else 1}" for name in names]
    for size in (1, 2, 3, 4, 9, 10, 5000):
        assert listed(None, size) == everything
        assert listed("beta", size) == everything[3:6]
    assert store.list("nobody").versions == ()
    assert len(store.list().versions) == 9


def test_list_checks_its_arguments(store: Store, adapters: Any) -> None:
    for name in ("acme/a", "acme/b"):
        store.publish(name, adapters(1))
    token = store.list("acme", 1).next_page_token
    assert store.list("acme", 1, token).versions[0].adapter == "b"
    for tenant, bad in (
        (None, token),
        ("beta", token),
        ("acme", token[:-3]),
        ("acme", "!"),
        ("acme", "é"),
        ("acme", "bnVsbA=="),
        ("acme", "W10="),
        ("acme", "WyIuLiIsICJhIiwgImFjbWUiXQ=="),
        ("acme", "x" * 10_240),
    ):
        with pytest.raises(InvalidArgument, match="page_token"):
            store.list(tenant, 1, bad)
    with pytest.raises(InvalidArgument, match="page_size"):
        store.list(page_size=-1)
    with pytest.raises(InvalidArgument, match="tenant"):
        store.list("../acme")


def test_a_new_name_between_pages_shifts_nothing(store: Store, adapters: Any) -> None:
    for name in ("acme/b", "acme/d", "acme/f"):
        store.publish(name, adapters(1))
    first = store.list(page_size=2)
    store.publish("acme/a", adapters(1))
    store.delete("acme/d")
    assert [
        v.adapter for v in store.list(page_size=2, page_token=first.next_page_token).versions
    ] == ["f"]


def refused(store: Store, root: Path, publish: Callable[[], object]) -> ManyloraError:
    """Publishing fails, and the store is as it was."""
    before = snapshot(root)
    with pytest.raises(ManyloraError) as caught:
        publish()
    assert snapshot(root) == before
    assert not list((root / "staging").iterdir())
    assert store.list().versions == ()
    return caught.value


def test_bad_checkpoints_change_nothing(
    store: Store, tmp_path: Path, write_checkpoint: Any
) -> None:
    root, source = tmp_path / "store", tmp_path / "source"

    def publish() -> object:
        return store.publish("acme/tickets", source)

    write_checkpoint(source, config={"layer_replication": [[0, 1]]})
    assert isinstance(refused(store, root, publish), FailedPrecondition)
    write_checkpoint(source, config={"r": 300})
    assert isinstance(refused(store, root, publish), InvalidArgument)
    write_checkpoint(source, tensors={"a": torch.tensor([float("nan")])})
    assert "not finite" in str(refused(store, root, publish))
    write_checkpoint(source)
    os.truncate(source / WEIGHTS, 100)
    assert "ends within its header" in str(refused(store, root, publish))
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).symlink_to("/etc/passwd")
    assert "links are not followed" in str(refused(store, root, publish))
    (source / WEIGHTS).unlink()
    torch.save({}, source / "adapter_model.bin")
    assert "pickled" in str(refused(store, root, publish))


def test_bad_names_and_aliases_change_nothing(store: Store, tmp_path: Path, adapters: Any) -> None:
    for name, aliases in (
        ("a/../b", ()),
        ("acme/x" * 2000, ()),
        ("a/b", ["latest"]),
        ("a/b", [""]),
    ):
        error = refused(
            store, tmp_path / "store", lambda n=name, a=aliases: store.publish(n, adapters(1), a)
        )
        assert isinstance(error, InvalidArgument)


def test_the_last_check_sees_the_staged_copy(store: Store, tmp_path: Path, adapters: Any) -> None:
    seen = []

    def check(path: Path) -> None:
        seen.append(path)
        assert (path / WEIGHTS).read_bytes() == (adapters(1) / WEIGHTS).read_bytes()
        assert path.is_relative_to(tmp_path / "store" / "staging")
        raise FailedPrecondition("does not fit")

    error = refused(
        store, tmp_path / "store", lambda: store.publish("a/b", adapters(1), check=check)
    )
    assert "does not fit" in str(error)
    assert len(seen) == 1
    assert store.publish("a/b", adapters(1), check=lambda _: None).version == 1


def test_upload_in_pieces(store: Store, adapters: Any) -> None:
    with store.begin_upload() as upload:
        upload.write("README.md", b"dropped")
        for name in (WEIGHTS, CONFIG):
            data = (adapters(1) / name).read_bytes()
            for begin in range(0, len(data), 100):
                upload.write(name, data[begin : begin + 100])
        version = upload.commit("acme/tickets", ["prod"])
    assert version == store.publish("acme/tickets", adapters(1))
    with pytest.raises(FailedPrecondition, match="over"):
        upload.write(CONFIG, b"{}")
    with pytest.raises(FailedPrecondition, match="over"):
        upload.commit("acme/tickets")
    upload.abort()
    assert store.open_object(version.digest).is_dir()


def test_a_client_that_vanishes_leaves_nothing(store: Store, tmp_path: Path, adapters: Any) -> None:
    before = snapshot(tmp_path / "store")
    upload = store.begin_upload()
    upload.write(WEIGHTS, (adapters(1) / WEIGHTS).read_bytes()[:200])
    upload.abort()
    upload.abort()
    with pytest.raises(RuntimeError), store.begin_upload() as upload:
        upload.write(CONFIG, b"{")
        raise RuntimeError
    assert snapshot(tmp_path / "store") == before
    assert not list((tmp_path / "store" / "staging").iterdir())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("adapter_model.bin", "pickled weights"),
        ("model.pt", "pickled weights"),
        ("../adapter_config.json", "not a file of a checkpoint"),
        ("/etc/passwd", "not a file of a checkpoint"),
        ("sub/adapter_config.json", "not a file of a checkpoint"),
        ("..", "not a file of a checkpoint"),
        ("", "not a file of a checkpoint"),
        ("a\0b", "not a file of a checkpoint"),
        ("a\\b", "not a file of a checkpoint"),
    ],
)
def test_upload_refuses_paths(store: Store, tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message), store.begin_upload() as upload:
        upload.write(path, b"x")
    assert not (tmp_path / "adapter_config.json").exists()


def test_upload_limits_hold_while_writing(tmp_path: Path) -> None:
    limits = Limits(max_config_bytes=100, max_weights_bytes=1000)
    store = Store(tmp_path / "store", limits)
    for path, limit in ((CONFIG, 100), (WEIGHTS, 1000), ("README.md", 100)):
        with store.begin_upload() as upload:
            upload.write(path, bytes(limit))
            with pytest.raises(InvalidArgument, match=f"too large.*at most {limit} bytes"):
                upload.write(path, b"x")
    store.close()


def test_a_full_disk(store: Store, tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    upload = store.begin_upload()
    upload.write(WEIGHTS, b"begun")
    upload._files[WEIGHTS].close()
    upload._files[WEIGHTS] = FileIO("/dev/full", "w")
    with pytest.raises(ResourceExhausted, match="disk is full"):
        upload.write(WEIGHTS, bytes(100))
    upload.abort()
    assert not list((tmp_path / "store" / "staging").iterdir())


@pytest.mark.parametrize("reopened", [True, False])
def test_changed_bytes_are_found(tmp_path: Path, adapters: Any, reopened: bool) -> None:
    store = Store(tmp_path / "store")
    version = store.publish("acme/tickets", adapters(1))
    assert store.open_object(version.digest).is_dir()
    weights = next((tmp_path / "store").rglob(WEIGHTS))
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(0, 0))  # however coarse the file system's clock is
    if reopened:
        store.close()
        store = Store(tmp_path / "store")
    with pytest.raises(DataLoss, match="do not match"):
        store.open_object(version.digest)
    weights.unlink()
    with pytest.raises(DataLoss, match="do not match"):
        store.open_object(version.digest)
    healed = store.publish("acme/tickets", adapters(1))  # the same content mends it
    assert healed.version == 1
    assert store.open_object(version.digest).is_dir()
    store.close()
    shutil.rmtree(weights.parent)
    store = Store(tmp_path / "store")
    with pytest.raises(DataLoss, match="gone"):
        store.open_object(version.digest)
    store.close()


def test_a_root_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(FailedPrecondition) as caught:
            Store(root)
        assert (caught.value.field, caught.value.found) == ("store", str(root))


def test_opening_clears_what_a_crash_left(tmp_path: Path, adapters: Any, assert_whole: Any) -> None:
    root = tmp_path / "store"
    store = Store(root)
    kept = store.publish("acme/tickets", adapters(1))
    store.begin_upload().write(WEIGHTS, b"half")
    orphan = root / "objects" / "00" / ("00" * 32)
    shutil.copytree(adapters(2), orphan)
    other = Store(root)  # not alone: the upload of the other store may be alive
    assert len(list((root / "staging").iterdir())) == 1
    assert orphan.exists()
    other.close()
    store.close()
    assert_whole(root)
    with_store = Store(root)
    assert with_store.resolve("acme/tickets") == kept
    with_store.close()


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(FailedPrecondition, match="format 99; wanted format 1"):
        Store(tmp_path)
