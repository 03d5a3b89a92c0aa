"""`adapter_model.bin`: only where it is allowed, only tensors, never as it came."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manylora.adapters_store.format import read_checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.store import Store
from manylora.errors import InvalidArgument

BIN, WEIGHTS = "adapter_model.bin", "adapter_model.safetensors"


class Touch:
    """A pickle that makes a file when it is loaded by pickle itself."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def allowing(tmp_path: Path) -> Iterator[Store]:
    limits = Limits(allow_pickles=True, max_weights_bytes=1 << 20)
    store = Store(tmp_path / "allowing", limits)
    yield store
    store.close()


@pytest.fixture
def pickled(tmp_path: Path, write_checkpoint: Any) -> Callable[..., Path]:
    """A sound checkpoint, its weights saved by torch; or other content in their place."""

    def make(content: Any = None, **options: Any) -> Path:
        directory: Path = write_checkpoint(tmp_path / "pickled")
        weights = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        torch.save(weights if content is None else content, directory / BIN, **options)
        return directory

    return make


@pytest.mark.parametrize("zipped", [True, False])
def test_becomes_safetensors_once(
    allowing: Store,
    pickled: Callable[..., Path],
    tmp_path: Path,
    write_checkpoint: Any,
    zipped: bool,
) -> None:
    directory = pickled(_use_new_zipfile_serialization=zipped)
    version = allowing.publish("acme/old", directory)
    kept = allowing.open_object(version.digest)
    assert {file.name for file in kept.iterdir()} == {"adapter_config.json", WEIGHTS}
    wanted = load_file(write_checkpoint(tmp_path / "same") / WEIGHTS)
    checkpoint = read_checkpoint(kept)
    found = checkpoint.load(checkpoint.tensors)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert allowing.publish("acme/old", directory).digest == version.digest


def test_shared_memory_is_pulled_apart(allowing: Store, pickled: Callable[..., Path]) -> None:
    whole = torch.arange(64.0).reshape(8, 8)
    module = "base_model.model.model.layers.0.self_attn"
    views = {
        f"{module}.{name}_proj.lora_{side}.weight": whole[:4] if side == "A" else whole.T[:, :4]
        for name in "qv"
        for side in "AB"
    }
    version = allowing.publish("acme/views", pickled(views))
    found = load_file(allowing.open_object(version.digest) / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in views.items())


def test_safetensors_beside_it_come_first(
    allowing: Store, write_checkpoint: Any, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "both")
    (directory / BIN).write_bytes(b"nonsense")
    version = allowing.publish("acme/both", directory)
    with allowing.begin_upload() as upload:
        for file in directory.iterdir():
            upload.write(file.name, file.read_bytes())
        assert upload.commit("acme/both").digest == version.digest


def test_off_by_default(store: Store, pickled: Callable[..., Path]) -> None:
    with pytest.raises(InvalidArgument, match=r"pickled weights are not read.*allow_pickles"):
        store.publish("acme/old", pickled())


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"a": 3},
        {3: torch.ones(2)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(1).expand(1 << 40)},
        {"a": torch.ones(2, dtype=torch.complex64)},
    ],
)
def test_anything_else_is_refused(
    allowing: Store, pickled: Callable[..., Path], content: Any
) -> None:
    with pytest.raises(InvalidArgument, match=r"adapter_model\.bin"):
        allowing.publish("acme/odd", pickled(content))
    assert not allowing.list().versions


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_runs(
    allowing: Store, pickled: Callable[..., Path], tmp_path: Path, protocol: int
) -> None:
    directory = pickled()
    made = tmp_path / "made"
    (directory / BIN).write_bytes(pickle.dumps(Touch(made), protocol))
    with pytest.raises(InvalidArgument, match="not a file of tensors by name"):
        allowing.publish("acme/evil", directory)
    torch.save(Touch(made), directory / BIN)
    with pytest.raises(InvalidArgument, match="not a file of tensors by name"):
        allowing.publish("acme/evil", directory)
    assert not made.exists()


def test_a_zip_that_unpacks_to_too_much(allowing: Store, pickled: Callable[..., Path]) -> None:
    directory = pickled()
    with zipfile.ZipFile(directory / BIN, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(4 << 20))
    assert (directory / BIN).stat().st_size < 1 << 20
    with pytest.raises(InvalidArgument, match="too large"):
        allowing.publish("acme/bomb", directory)
