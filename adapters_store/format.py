"""The PEFT checkpoint format: `adapter_config.json` and `adapter_model.safetensors`.

Reading checks the two files as files: sizes, strict JSON, a header that describes the bytes,
finite weights. What they mean is the business of `lowering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from manylora import kernels
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE, open_directory, open_file
from manylora.adapters_store.limits import DEFAULT_LIMITS, Limits
from manylora.adapters_store.safetensors_header import TensorInfo, read_header
from manylora.adapters_store.strict_json import loads_object
from manylora.errors import DataLoss, InvalidArgument

_CHUNK_BYTES = 1 << 18  # it, and what is made of it, stay in a core's cache
_Run: TypeAlias = Sequence[tuple[str, TensorInfo]]
_BITS: Mapping[torch.dtype, tuple[int, int]] = {  # each dtype's bytes, and its infinity as integer
    torch.bfloat16: (2, 0x7F80),
    torch.float16: (2, 0x7C00),
    torch.float32: (4, 0x7F80_0000),
}


@dataclass(slots=True, frozen=True)
class Checkpoint:
    """A checkpoint whose files are sound; its weights stay on disk until `load`, which checks them,
    too: a load reads them once."""

    directory: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    weights_bytes: int  # of the whole file, also where `tensors` are a part of it

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads tensors by name into memory of their own, in the file's dtypes.

        Raises DataLoss if the file shrank since it was checked, InvalidArgument if it is gone or
        has weights that are not finite.
        """
        with (
            open_directory(self.directory) as directory,
            open_file(directory, WEIGHTS_FILE, self.weights_bytes) as file,
        ):
            return _read_tensors(file, {name: self.tensors[name] for name in names})


def read_checkpoint(directory: Path, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """Reads and checks the two files of a directory, weights and all; others in it are ignored.

    Raises InvalidArgument naming the file, and within it the key or tensor.
    """
    checkpoint = open_checkpoint(directory, limits)
    with (
        open_directory(directory) as descriptor,
        open_file(descriptor, WEIGHTS_FILE, checkpoint.weights_bytes) as file,
    ):
        chunk = np.empty(_CHUNK_BYTES, np.uint8)
        for run in _runs(checkpoint.tensors):
            for begin, end in _chunks(run):
                _read_chunk(file, chunk[: end - begin], run, begin)
    return checkpoint


def open_checkpoint(directory: Path, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """The same, for the weights, which are only checked when they are loaded."""
    with open_directory(directory) as descriptor:
        with open_file(descriptor, CONFIG_FILE, limits.max_config_bytes) as file:
            config = loads_object(file.read(limits.max_config_bytes), CONFIG_FILE)
        with open_file(descriptor, WEIGHTS_FILE, limits.max_weights_bytes) as file:
            tensors = read_header(file, limits)
    weights_bytes = max((info.end for info in tensors.values()), default=0)
    return Checkpoint(directory, config, tensors, weights_bytes)


def _runs(tensors: Mapping[str, TensorInfo]) -> Iterator[_Run]:
    """The tensors, those of one dtype that lie side by side together: a file has hundreds, and
    what a call costs is more than what it does."""
    run: list[tuple[str, TensorInfo]] = []
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if run and (run[-1][1].end, run[-1][1].dtype) != (info.begin, info.dtype):
            yield run
            run = []
        run.append((name, info))
    if run:
        yield run


def _read_tensors(file: FileIO, tensors: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Views of one piece of memory, which goes back to the system with the last of them."""
    runs = list(_runs(tensors))
    sizes = [run[-1][1].end - run[0][1].begin for run in runs]
    buffers = kernels.side_by_side([[size] for size in sizes], torch.uint8, torch.device("cpu"))
    found: dict[str, torch.Tensor] = {}
    for run, data in zip(runs, buffers, strict=True):
        for begin, end in _chunks(run):
            first = run[0][1].begin
            _read_chunk(file, data[begin - first : end - first].numpy(), run, begin)
        numels = [(info.end - info.begin) // info.dtype.itemsize for _, info in run]
        parts = torch.split(data.view(run[0][1].dtype), numels)
        found |= {
            name: part.view(info.shape) for (name, info), part in zip(run, parts, strict=True)
        }
    return found


def _chunks(run: _Run) -> Iterator[tuple[int, int]]:
    """Parts of a run's bytes: where they begin and end in the file."""
    begin, end = run[0][1].begin, run[-1][1].end
    for start in range(begin, end, _CHUNK_BYTES):
        yield start, min(start + _CHUNK_BYTES, end)


def _read_chunk(file: FileIO, part: npt.NDArray[np.uint8], run: _Run, begin: int) -> None:
    """Fills the part with a run's bytes from `begin` on, and checks that they are finite numbers.

    Floats of one sign are ordered as the integers of the same bits are: infinity comes after all
    finite ones, NaNs after infinity. So the largest integer, with a sign and without one, tells.
    """
    word, infinity = _BITS[run[0][1].dtype]
    file.seek(begin)
    _read_into(file, part.data, run[0][0])
    values, sign = part.view(f"u{word}"), 1 << (8 * word - 1)
    if part.view(f"i{word}").max() < infinity and values.max() < sign + infinity:
        return
    magnitudes = values & (sign - 1)
    first_bad = int((magnitudes >= infinity).argmax())
    raise InvalidArgument(
        "weights are not finite",
        field=f"{WEIGHTS_FILE}: {_owner(run, begin + first_bad * word)}",
        found="NaN" if magnitudes[first_bad] > infinity else "infinity",
        wanted="finite numbers",
    )


def _owner(run: _Run, byte: int) -> str:
    return next(name for name, info in run if info.begin <= byte < info.end)


def _read_into(file: FileIO, view: memoryview, name: str) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise DataLoss("the file shrank while it was read", field=f"{WEIGHTS_FILE}: {name}")
        view = view[count:]
