"""The PEFT checkpoint format: `adapter_config.json` and `adapter_model.safetensors`.

Reading checks the two files as files: sizes, strict JSON, a header that describes the bytes,
finite weights. What they mean is the business of `lowering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch

from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE, open_directory, open_file
from manylora.adapters_store.limits import DEFAULT_LIMITS, Limits
from manylora.adapters_store.safetensors_header import TensorInfo, read_header
from manylora.adapters_store.strict_json import loads_object
from manylora.errors import DataLoss, InvalidArgument

_CHUNK_BYTES = 1 << 18  # it, and what is made of it, stay in a core's cache
_Words = np.dtype[np.uint16] | np.dtype[np.uint32]
_BITS: Mapping[torch.dtype, tuple[_Words, int]] = {  # each dtype's words, and its infinity as one
    torch.bfloat16: (np.dtype(np.uint16), 0x7F80),
    torch.float16: (np.dtype(np.uint16), 0x7C00),
    torch.float32: (np.dtype(np.uint32), 0x7F80_0000),
}


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
            wanted = {name: self.tensors[name] for name in names}
            return {name: tensor for run in _runs(wanted) for name, tensor in _read_run(file, run)}


def read_checkpoint(directory: Path, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """Reads and checks the two files of a directory; others in it are ignored.

    Raises InvalidArgument naming the file, and within it the key or tensor.
    """
    with open_directory(directory) as descriptor:
        with open_file(descriptor, CONFIG_FILE, limits.max_config_bytes) as file:
            config = loads_object(file.read(limits.max_config_bytes), CONFIG_FILE)
        with open_file(descriptor, WEIGHTS_FILE, limits.max_weights_bytes) as file:
            tensors = read_header(file, limits)
            for run in _runs(tensors):
                _check_finite(file, run)
    weights_bytes = max((info.end for info in tensors.values()), default=0)
    return Checkpoint(directory, config, tensors, weights_bytes)


def _runs(tensors: Mapping[str, TensorInfo]) -> Iterator[list[tuple[str, TensorInfo]]]:
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


def _read_run(
    file: FileIO, run: Sequence[tuple[str, TensorInfo]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of one buffer."""
    (first_name, first), (_, last) = run[0], run[-1]
    data = torch.empty(last.end - first.begin, dtype=torch.uint8)
    file.seek(first.begin)
    _read_into(file, memoryview(data.numpy()), first_name)  # type: ignore[arg-type]
    for name, info in run:
        part = data[info.begin - first.begin : info.end - first.begin]
        yield name, part.view(info.dtype).view(info.shape)


def _check_finite(file: FileIO, run: Sequence[tuple[str, TensorInfo]]) -> None:
    """Without their signs, floats are ordered as the integers of the same bits are: infinity comes
    after all finite ones, NaNs after infinity."""
    (first_name, first), (_, last) = run[0], run[-1]
    words, infinity = _BITS[first.dtype]
    unsigned = (1 << (8 * words.itemsize - 1)) - 1
    chunk = np.empty(_CHUNK_BYTES, np.uint8)
    file.seek(first.begin)
    for begin in range(first.begin, last.end, _CHUNK_BYTES):
        part = chunk[: last.end - begin]
        _read_into(file, part.data, first_name)
        magnitudes = part.view(words) & unsigned
        if part.size and magnitudes.max() >= infinity:
            first_bad = int((magnitudes >= infinity).argmax())
            owner = _owner(run, begin + first_bad * words.itemsize)
            raise InvalidArgument(
                "weights are not finite",
                field=f"{WEIGHTS_FILE}: {owner}",
                found="NaN" if magnitudes[first_bad] > infinity else "infinity",
                wanted="finite numbers",
            )


def _owner(run: Sequence[tuple[str, TensorInfo]], byte: int) -> str:
    return next(name for name, info in run if info.begin <= byte < info.end)


def _read_into(file: FileIO, view: memoryview, name: str) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise DataLoss("the file shrank while it was read", field=f"{WEIGHTS_FILE}: {name}")
        view = view[count:]
