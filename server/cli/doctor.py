"""`manylora doctor`: what this machine and installation would serve with."""

from __future__ import annotations

import os
import platform
import warnings
from importlib import metadata
from typing import Annotated

import typer

from manylora import __version__
from manylora.server.cli.output import human_bytes, print_json, print_table

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "grpcio", "protobuf")
OPTIONAL_PACKAGES = {
    "peft": "train",
    "accelerate": "train",
    "gguf": "gguf",
    "triton": "gpu",
    "bitsandbytes": "bnb",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the device, the kernels in use and the versions of what is installed."""
    facts = _versions() | _device() | _kernels()
    if as_json:
        print_json(facts)
    else:
        print_table(("", ""), facts.items())


def _versions() -> dict[str, str]:
    facts = {"manylora": __version__, "python": platform.python_version()}
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    facts |= {name: _version(name) or "not installed" for name in PACKAGES}
    for name, extra in OPTIONAL_PACKAGES.items():
        facts[name] = _version(name) or f"not installed (pip install 'manylora[{extra}]')"
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, str]:
    import torch

    facts = {
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = f"cuda ({properties.name}, {human_bytes(properties.total_memory)})"
    return facts


def _kernels() -> dict[str, str]:
    import torch

    from manylora import kernels
    from manylora.kernels import cpu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is said below
        backend = kernels.select("cuda" if torch.cuda.is_available() else "cpu")
    if cpu.available():
        built = f"built; runs here: {', '.join(cpu.isas())}; in use: {cpu.current_isa()}"
    else:
        built = (
            f"not built: {cpu.why_unavailable()}. On a CPU the plain torch reference runs instead: "
            "the same answers, many times slower. Install a C++17 compiler, then manylora again."
        )
    return {"kernels": backend.NAME, "C++ kernels": built}
