"""Where the engine runs, and with which kernels, as the settings say."""

from __future__ import annotations

import torch

from manylora import kernels
from manylora.errors import FailedPrecondition
from manylora.kernels import cpu


def choose_device(name: str) -> torch.device:
    """name: "auto", "cpu" or "cuda". Raises FailedPrecondition."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise FailedPrecondition("torch sees no GPU", field="device", found=name)
    if name == "cuda" or (name == "auto" and there):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def choose_kernels(device: torch.device, name: str) -> kernels.Backend:
    """name: "auto" or a backend's. Raises FailedPrecondition."""
    if name == cpu.NAME and device.type != "cpu":
        raise FailedPrecondition(
            "these kernels read a CPU's memory only", field="kernels", found=name, wanted="auto"
        )
    try:
        return kernels.select(device, None if name == "auto" else name)
    except ValueError as error:
        raise FailedPrecondition(str(error), field="kernels", found=name) from error
