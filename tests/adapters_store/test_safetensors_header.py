"""Headers: what we accept, the safetensors library accepts with the same meaning."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manylora.adapters_store.files import open_directory, open_file
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.safetensors_header import TensorInfo, read_header
from manylora.errors import InvalidArgument

NAME = "adapter_model.safetensors"
LIMITS = Limits(max_header_bytes=4096, max_tensors=5, max_weights_bytes=1 << 20)
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(directory: Path, limits: Limits = LIMITS) -> dict[str, TensorInfo]:
    with (
        open_directory(directory) as descriptor,
        open_file(descriptor, NAME, limits.max_weights_bytes) as file,
    ):
        return dict(read_header(file, limits))


def write_raw(directory: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    count = len(header) if length is None else length
    (directory / NAME).write_bytes(count.to_bytes(8, "little") + header + data)


def write_header(directory: Path, header: Any, data: bytes) -> None:
    write_raw(directory, json.dumps(header).encode(), data)


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_sound_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "a": torch.randn(4, 1),
        "c": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / NAME, metadata={"format": "pt"})
    infos = read(tmp_path)
    data = (tmp_path / NAME).read_bytes()
    for name, tensor in load_file(tmp_path / NAME).items():
        info = infos[name]
        ours = torch.frombuffer(bytearray(data[info.begin : info.end]), dtype=info.dtype)
        assert torch.equal(ours.reshape(info.shape), tensor)
    assert infos.keys() == tensors.keys()


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": entry()}).encode().ljust(0x0280)  # b"\x80\x02" opens a pickle, too
    write_raw(tmp_path, header, bytes(8))
    assert read(tmp_path)["a"].shape == (2,)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({}, b"", "no tensors"),
        ([], b"", "begins with '{'"),
        ({"__metadata__": {"format": 1}, "a": entry()}, bytes(8), "map of texts"),
        ({"__metadata__": [], "a": entry()}, bytes(8), "map of texts"),
        ({"a": entry(dtype="F64", offsets=[0, 16])}, bytes(16), "dtype is not served"),
        ({"a": entry(dtype="I8", offsets=[0, 2])}, bytes(2), "dtype is not served"),
        ({"a": entry(dtype=7)}, bytes(8), "dtype is not served"),
        ({"a": entry(shape=[-1], offsets=[0, 0])}, b"", "shape"),
        ({"a": entry(shape=[0], offsets=[0, 4])}, bytes(4), "do not match shape and dtype"),
        ({"a": entry(shape=[-2])}, bytes(8), "shape"),
        ({"a": entry(shape=[2.0])}, bytes(8), "shape"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "shape"),
        ({"a": entry(shape="2")}, bytes(8), "shape"),
        ({"a": entry(shape=[1] * 9 + [2])}, bytes(8), "shape"),
        ({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8), "shape"),
        ({"a": entry(shape=[3])}, bytes(8), "do not match shape and dtype"),
        ({"a": entry(offsets=[0, 4])}, bytes(8), "do not match shape and dtype"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "do not match shape and dtype"),
        ({"a": entry(offsets=[0, 8, 8])}, bytes(8), "not two offsets"),
        ({"a": entry(offsets=[-8, 0])}, bytes(8), "data_offsets"),
        ({"a": entry(offsets=[4, 12])}, bytes(12), "overlap or leave a hole"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlap or leave a hole"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "overlap or leave a hole"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "overlap or leave a hole"),
        ({"a": entry()}, bytes(7), "truncated"),
        ({"a": entry()}, bytes(9), "after the last tensor"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "malformed"),
        ({"a": {**entry(), "extra": 1}}, bytes(8), "malformed"),
        ({"a": "F32"}, bytes(8), "malformed"),
        ({"": entry()}, bytes(8), "not a tensor's name"),
        ({"a\nb": entry()}, bytes(8), "not a tensor's name"),
        ({"lora\u202eA": entry()}, bytes(8), "not a tensor's name"),
        ({"x" * 600: entry()}, bytes(8), "not a tensor's name"),
        ({f"t{i}": entry(offsets=[8 * i, 8 * i + 8]) for i in range(6)}, bytes(48), "too many"),
    ],
)
def test_header_that_lies_is_refused(
    tmp_path: Path, header: Any, data: bytes, message: str
) -> None:
    write_header(tmp_path, header, data)
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a":1,"a":2}', "occurs twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', "occurs twice"),
        (b'{"a":NaN}', "not a JSON number"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' + b"9" * 4400 + b"}", "header is too large"),
        (b'{"a":', "not valid JSON"),
        (b'{"a":1} x', "not valid JSON"),
        (b'{"\xff":1}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a":1}', "begins with '{'"),
        (b' {"a":1}', "begins with '{'"),
        (b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}", "nested too deeply"),
    ],
)
def test_header_that_is_not_strict_json_is_refused(
    tmp_path: Path, raw: bytes, message: str
) -> None:
    write_raw(tmp_path, raw, b"")
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path)


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "ends within its header"),
        (lambda path: path.write_bytes(b"\x01\x00\x00"), "ends within its header"),
        (lambda path: path.write_bytes((100).to_bytes(8, "little") + b"{}"), "ends within"),
        (lambda path: path.write_bytes((5000).to_bytes(8, "little") + b"{" * 6000), "too large"),
        (lambda path: path.write_bytes(b"\xff" * 64), "too large"),
        (lambda path: path.write_bytes(pickle.dumps({"a": [1] * 50})), "found a pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)), "found a pickle"),
        (lambda path: torch.save({"a": torch.ones(2)}, path), "found a zip"),
        (zip_file, "found a zip"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(32)), "GGUF|begins with"),
    ],
)
def test_file_that_is_something_else_is_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / NAME)
    with pytest.raises(InvalidArgument, match=message) as caught:
        read(tmp_path)
    assert NAME in caught.value.field


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / NAME)
    whole = (tmp_path / NAME).read_bytes()
    for length in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:length])
        with pytest.raises(InvalidArgument):
            read(tmp_path)


def accepted_like_the_library(directory: Path) -> None:
    """Either refused with our own error, or read by the library with the same meaning."""
    try:
        infos = read(directory)
    except InvalidArgument:
        return
    with safe_open(directory / NAME, framework="pt") as library:
        assert set(library.keys()) == infos.keys()
        for name, info in infos.items():
            tensor = library.get_tensor(name)
            assert tensor.dtype == info.dtype
            assert tuple(tensor.shape) == info.shape


@FUZZ
@given(data=st.data())
def test_mutated_files(tmp_path: Path, data: st.DataObject) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2, 2).half()}, tmp_path / NAME)
    content = bytearray((tmp_path / NAME).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["byte", "digit", "cut", "insert"]))
        if kind == "byte":
            content[position] = data.draw(st.integers(0, 255))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()] or [position]
            content[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123489")))
        elif kind == "cut":
            del content[position:]
            content += b"\0"
        else:
            content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
    (tmp_path / NAME).write_bytes(content)
    accepted_like_the_library(tmp_path)


numbers = st.one_of(st.integers(-2, 20), st.integers(0, 1 << 70), st.floats(), st.booleans())
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "", None]),
        "shape": st.lists(st.one_of(st.integers(1, 3), numbers), max_size=3),
        "data_offsets": st.one_of(
            st.sampled_from([[0, 2], [0, 4], [0, 8], [2, 4], [4, 8], [4, 12], [8, 16]]),
            st.lists(numbers, max_size=3),
        ),
    }
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "é"]), entries, max_size=3),
    size=st.integers(0, 20),
)
def test_generated_headers(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    write_header(tmp_path, header, bytes(size))
    accepted_like_the_library(tmp_path)
