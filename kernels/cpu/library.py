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
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""How a call names its tensors' type (`DType` in types.h)."""

_PATH = Path(__file__).with_name("libmanylora_cpu.so")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    try:
        library = ctypes.CDLL(str(_PATH))
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        pool = (torch_library.torch_parallel_for, torch_library.torch_get_num_threads)
    except (OSError, AttributeError) as error:
        return None, f"the C++ kernels were not built or cannot be loaded ({error})"
    library.manylora_isa_name.restype = ctypes.c_char_p
    library.manylora_set_pool.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.manylora_set_pool(*(ctypes.cast(part, ctypes.c_void_p) for part in pool))
    return library, ""


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


def kernel(name: str, layout: str) -> Callable[..., None]:
    """The C function manylora_`name`; where there is no library, one that raises RuntimeError.

    Its arguments go packed into 8 bytes each: ctypes takes twice as long for ten of its own.

    Args:
        layout: as `struct` writes it, q for an integer or an address (0: null), d for a float.
    """
    if _library is None:
        return _unavailable
    function = getattr(_library, f"manylora_{name}")
    function.argtypes = (ctypes.c_char_p,)
    function.restype = None
    pack = struct.Struct(layout).pack

    def call(*arguments: float) -> None:
        function(pack(*arguments))

    return call


def _unavailable(*_: object) -> None:
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
