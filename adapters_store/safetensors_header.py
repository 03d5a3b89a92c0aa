"""The header of a safetensors file, read with nothing taken on trust.

The format (github.com/huggingface/safetensors, 'Format'): 8 bytes N, unsigned little-endian; N
bytes of a JSON object, name → {dtype, shape, data_offsets}, padded with spaces; the tensors'
bytes, row-major and little-endian, without holes or overlaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from types import MappingProxyType

import torch

from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.strict_json import loads_object
from manylora.errors import InvalidArgument

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_KNOWN_BYTES = 1 << 18  # longer headers are not kept
_MAX_DIMENSIONS = 8
_METADATA = "__metadata__"
_NOT_SAFETENSORS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"version ", "a Git LFS pointer, not the file itself"),
)


@dataclass(slots=True, frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [begin, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: FileIO, limits: Limits) -> Mapping[str, TensorInfo]:
    """Reads and checks the header; leaves the file's position anywhere.

    Returns tensors by name in the order of their bytes. Raises InvalidArgument, naming the tensor,
    for every way in which header and file can disagree, for other dtypes than F32, F16 and BF16,
    and for what is over the limits.
    """
    size = os.fstat(file.fileno()).st_size
    text = _header_text(file, size, limits)
    return (_parse_known if len(text) <= _KNOWN_BYTES else _parse)(text, size, limits)


def _parse(text: bytes, size: int, limits: Limits) -> Mapping[str, TensorInfo]:
    header = dict(loads_object(text, WEIGHTS_FILE))
    _check_metadata(header.pop(_METADATA, {}))
    if not header:
        raise InvalidArgument("no tensors in the file", field=WEIGHTS_FILE)
    if len(header) > limits.max_tensors:
        raise InvalidArgument(
            "too many tensors",
            field=WEIGHTS_FILE,
            found=len(header),
            wanted=f"at most {limits.max_tensors}",
        )
    data = 8 + len(text)
    tensors = {name: _tensor(name, entry, data, limits) for name, entry in header.items()}
    return MappingProxyType(_check_layout(tensors, data, size))


# Adapters of one recipe have one header, and there are many of them.
_parse_known = lru_cache(maxsize=16)(_parse)


def _header_text(file: FileIO, size: int, limits: Limits) -> bytes:
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) == 8 and length <= min(size - 8, limits.max_header_bytes):
        text = _read_exactly(file, length)
        if text.startswith(b"{"):
            return text
    for magic, what in _NOT_SAFETENSORS:
        if start.startswith(magic):
            raise InvalidArgument(
                "not a safetensors file", field=WEIGHTS_FILE, found=what, wanted="safetensors"
            )
    if len(start) < 8 or size - 8 < length <= limits.max_header_bytes:
        raise InvalidArgument(
            "the file ends within its header",
            field=WEIGHTS_FILE,
            found=f"{size} bytes",
            wanted=f"at least {length + 8} bytes",
        )
    if length > limits.max_header_bytes:
        raise InvalidArgument(
            "the header is too large, or this is not a safetensors file",
            field=WEIGHTS_FILE,
            found=f"{length} bytes",
            wanted=f"at most {limits.max_header_bytes} bytes",
        )
    raise InvalidArgument(
        "not a safetensors file", field=WEIGHTS_FILE, wanted="a header that begins with '{'"
    )


def _read_exactly(file: FileIO, count: int) -> bytes:
    parts = []
    while count:
        part = file.read(count)
        if not part:
            raise InvalidArgument("the file ends within its header", field=WEIGHTS_FILE)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise InvalidArgument(
            "not a map of texts",
            field=f"{WEIGHTS_FILE}: {_METADATA}",
            wanted="an object of strings",
        )


def _tensor(name: str, entry: object, data: int, limits: Limits) -> TensorInfo:
    if (
        not name
        or len(name) > limits.max_tensor_name
        or not (name.isascii() and name.isprintable())
    ):
        raise InvalidArgument(
            "not a tensor's name",
            field=WEIGHTS_FILE,
            found=ascii(name),
            wanted=f"1 to {limits.max_tensor_name} printable ASCII characters",
        )
    field = f"{WEIGHTS_FILE}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidArgument(
            "a tensor's entry is malformed", field=field, wanted="dtype, shape and data_offsets"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidArgument(
            "dtype is not served", field=field, found=ascii(dtype), wanted=" or ".join(DTYPES)
        )
    shape = _whole_numbers(entry, "shape", field)
    offsets = _whole_numbers(entry, "data_offsets", field)
    if len(offsets) != 2:
        raise InvalidArgument(
            "not two offsets", field=f"{field} (data_offsets)", found=len(offsets)
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise InvalidArgument(
            "the bytes do not match shape and dtype",
            field=field,
            found=f"{offsets[1] - offsets[0]} bytes",
            wanted=f"{expected} bytes for {list(shape)} of {dtype}",
        )
    return TensorInfo(DTYPES[dtype], shape, data + offsets[0], data + offsets[1])


def _whole_numbers(entry: Mapping[str, object], key: str, field: str) -> tuple[int, ...]:
    value = entry[key]
    if isinstance(value, list) and len(value) <= _MAX_DIMENSIONS:
        for item in value:
            if type(item) is not int or not 0 <= item < 1 << 48:
                break
        else:
            return tuple(value)
    raise InvalidArgument(
        "not a list of whole numbers",
        field=f"{field} ({key})",
        found=value if len(repr(value)) < 200 else "a long value",
        wanted=f"at most {_MAX_DIMENSIONS} numbers, each at least 0",
    )


def _check_layout(
    tensors: Mapping[str, TensorInfo], data: int, size: int
) -> Mapping[str, TensorInfo]:
    """The tensors' bytes must follow one another and fill the file."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = data
    for name, info in ordered.items():
        if info.begin != position:
            raise InvalidArgument(
                "tensors overlap or leave a hole",
                field=f"{WEIGHTS_FILE}: {name} (data_offsets)",
                found=info.begin - data,
                wanted=str(position - data),
            )
        position = info.end
    if position != size:
        raise InvalidArgument(
            "the file is truncated" if size < position else "there are bytes after the last tensor",
            field=WEIGHTS_FILE,
            found=f"{size} bytes",
            wanted=f"{position} bytes",
        )
    return ordered
