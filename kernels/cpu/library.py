"""The C++ library: found, loaded, given torch's threads, its ISA chosen.

The library is built by an install of the package, or in place from the repository's root with
`cmake -S . -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build`. The environment variable
MANYLORA_ISA (generic, avx2, avx512bf16, amx) overrides the choice of the fastest that runs here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from ctypes import c_bool, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

DTYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
"""How a call names a type (`DType` in types.h)."""

# Of libtorch's C functions: `Pool` in parallel.h, `TensorFunctions` in tensor.h.
_POOL = ("torch_parallel_for", "torch_get_num_threads")
_TENSOR_FUNCTIONS = tuple(
    f"aoti_torch_get_{what}"
    for what in ("data_ptr", "dim", "sizes", "strides", "dtype", "device_type")
)

_PATH = Path(__file__).with_name("libmanylora_cpu.so")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    try:
        library = ctypes.CDLL(str(_PATH))
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.manylora_set_pool(*_functions(torch_library, *_POOL))
        functions = _functions(torch_library, *_TENSOR_FUNCTIONS)
        library.manylora_set_tensor_functions((c_void_p * len(functions))(*functions))
        library.manylora_isa_name.restype = ctypes.c_char_p
        reads = library.manylora_reads
    except (OSError, AttributeError) as error:
        return None, f"the C++ kernels were not built or cannot be loaded ({error})"
    reads.argtypes, reads.restype = (c_void_p, c_void_p, c_int32, c_int64), c_bool
    for dtype, code in DTYPES.items():
        probe = torch.ones(3, dtype=dtype, device="cpu")
        if not reads(probe._cdata, probe.data_ptr(), code, 3):
            return None, f"the C++ kernels cannot read tensors of torch {torch.__version__}"
    return library, ""


def _functions(library: ctypes.CDLL, *names: str) -> list[c_void_p]:
    return [ctypes.cast(getattr(library, name), c_void_p) for name in names]


_library, _reason = _load()


def available() -> bool:
    """Whether the library was built and loads here."""
    return _library is not None


def why_unavailable() -> str:
    """The reason in words where `available` is False, else an empty string."""
    return _reason


def isas() -> tuple[str, ...]:
    """ISAs of the library that this machine can run, slowest first."""
    return tuple(name for name in _built_isas() if _require().manylora_isa_runs_here(_index(name)))


def set_isa(name: str) -> None:
    """Uses one ISA from now on, in the whole process. Not while a kernel runs, nor with
    factors that were packed before.

    Raises:
        ValueError: this library or machine has no such ISA.
    """
    if name not in isas():
        raise ValueError(f"ISA: found {name!r}; wanted one of {', '.join(isas())}")
    _require().manylora_set_isa(_index(name))


def current_isa() -> str:
    """The ISA in use."""
    index: int = _require().manylora_get_isa()
    return _built_isas()[index]


def kernel(name: str, layout: str) -> Callable[..., bool]:
    """The C function manylora_`name`, which returns whether its arguments fit each other; where
    there is no library, one that raises RuntimeError.

    They go packed into 8 bytes each: ctypes takes twice as long for ten of its own.

    Args:
        layout: as `struct` writes it, d for a float, q for all else: an integer, an address, a
            tensor's `_cdata` (0: null, None).
    """
    if _library is None:
        return _unavailable
    function = getattr(_library, f"manylora_{name}")
    function.restype = c_bool
    pack = struct.Struct(layout).pack

    def call(*arguments: float) -> bool:
        fits: bool = function(pack(*arguments))
        return fits

    return call


def describe(**tensors: torch.Tensor | None) -> str:
    """What tensors that do not fit each other are, in words."""
    found = []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout == torch.strided and not tensor.is_nested:
            lies = f"{tuple(tensor.shape)} {tensor.stride()}"
        else:
            lies = str(tensor.layout)
        found.append(f"{name} {tensor.device} {tensor.dtype} {lies}")
    return ", ".join(found)


def _unavailable(*_: object) -> bool:
    raise RuntimeError(_reason)


def _require() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(_reason)
    return _library


@functools.cache
def _built_isas() -> tuple[str, ...]:
    names: list[str] = []
    while (name := _require().manylora_isa_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def _index(name: str) -> int:
    return _built_isas().index(name)


if available():
    set_isa(os.environ.get("MANYLORA_ISA") or isas()[-1])
