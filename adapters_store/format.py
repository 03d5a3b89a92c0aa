"""The PEFT checkpoint format: `adapter_config.json` and `adapter_model.safetensors`.

Reading checks the two files as files: sizes, strict JSON, a header that describes the bytes,
finite weights. What they mean is the business of `lowering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE, open_directory, open_file
from manylora.adapters_store.limits import DEFAULT_LIMITS, Limits
from manylora.adapters_store.safetensors_header import TensorInfo, read_header
from manylora.adapters_store.strict_json import loads_object
from manylora.errors import DataLoss, InvalidArgument

_CHUNK_BYTES = 4 << 20


@dataclass(slots=True, frozen=True)
class Checkpoint:
    """A checkpoint whose files are sound; its weights stay on disk until `load`."""

    directory: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    weights_bytes: int  # of the whole file, also where `tensors` are a part of it

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads tensors by name into memory of their own, in the file's dtypes.

        Raises DataLoss if the file shrank since it was checked, InvalidArgument if it is gone.
        """
        with (
            open_directory(self.directory) as directory,
            open_file(directory, WEIGHTS_FILE, self.weights_bytes) as file,
        ):
            return {name: _read_tensor(file, name, self.tensors[name]) for name in names}


def read_checkpoint(directory: Path, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """Reads and checks the two files of a directory; others in it are ignored.

    Raises InvalidArgument naming the file, and within it the key or tensor.
    """
    with open_directory(directory) as descriptor:
        with open_file(descriptor, CONFIG_FILE, limits.max_config_bytes) as file:
            config = loads_object(file.read(limits.max_config_bytes), CONFIG_FILE)
        with open_file(descriptor, WEIGHTS_FILE, limits.max_weights_bytes) as file:
            tensors = read_header(file, limits)
            for name, info in tensors.items():
                _check_finite(file, name, info)
    weights_bytes = max((info.end for info in tensors.values()), default=0)
    return Checkpoint(directory, config, tensors, weights_bytes)


def _read_tensor(file: FileIO, name: str, info: TensorInfo) -> torch.Tensor:
    data = torch.empty(info.end - info.begin, dtype=torch.uint8)
    file.seek(info.begin)
    _read_into(file, data, name)
    return data.view(info.dtype).view(info.shape)


def _check_finite(file: FileIO, name: str, info: TensorInfo) -> None:
    file.seek(info.begin)
    chunk = torch.empty(min(_CHUNK_BYTES, info.end - info.begin), dtype=torch.uint8)
    for begin in range(info.begin, info.end, _CHUNK_BYTES):
        part = chunk[: info.end - begin]
        _read_into(file, part, name)
        low, high = torch.aminmax(part.view(info.dtype))  # both NaN where any value is
        if not (low.isfinite() and high.isfinite()):
            raise InvalidArgument(
                "weights are not finite",
                field=f"{WEIGHTS_FILE}: {name}",
                found="NaN" if low.isnan() else "infinity",
                wanted="finite numbers",
            )


def _read_into(file: FileIO, data: torch.Tensor, name: str) -> None:
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    while view:
        count = file.readinto(view)
        if not count:
            raise DataLoss("the file shrank while it was read", field=f"{WEIGHTS_FILE}: {name}")
        view = view[count:]
