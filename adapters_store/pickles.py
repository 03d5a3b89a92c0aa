"""`adapter_model.bin`, as peft saved it before safetensors: converted once, at publish.

Only through torch's weights-only loader, which builds tensors and plain containers and runs
nothing else; and only where the operator allows it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from manylora.adapters_store.files import PICKLED_WEIGHTS, WEIGHTS_FILE, check_size
from manylora.errors import InvalidArgument

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)


def convert_pickle(directory: Path, max_bytes: int) -> None:
    """Puts `adapter_model.safetensors` in the place of the directory's `adapter_model.bin`.

    max_bytes: of the tensors, unpacked. Raises InvalidArgument for what is not a mapping of names
    to dense tensors.
    """
    pickled = directory / PICKLED_WEIGHTS
    if zipfile.is_zipfile(pickled):
        with zipfile.ZipFile(pickled) as archive:
            check_size(sum(e.file_size for e in archive.infolist()), PICKLED_WEIGHTS, max_bytes)
    try:
        content = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises anything
        raise _refuse(type(error).__name__) from error
    if not isinstance(content, dict):
        raise _refuse(type(content).__name__)
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _refuse(f"{ascii(name)[:100]} of type {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise _refuse(f"{name[:100]!a}, {tensor.dtype}, {tensor.layout}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in content.values())
    check_size(size, PICKLED_WEIGHTS, max_bytes)  # a view may say that it is larger than its bytes
    apart = {name: tensor.detach().clone().contiguous() for name, tensor in content.items()}
    save_file(apart, directory / WEIGHTS_FILE)
    pickled.unlink()


def _refuse(found: str) -> InvalidArgument:
    return InvalidArgument(
        "not a file of tensors by name",
        field=PICKLED_WEIGHTS,
        found=found,
        wanted=f"dense tensors, as peft saves them, or better {WEIGHTS_FILE}",
    )
