"""How large an adapter may be before it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Limits:
    """Bounds on one adapter checkpoint; what is over a bound is refused before it is read."""

    max_rank: int = 256
    max_config_bytes: int = 1 << 20
    max_weights_bytes: int = 2 << 30
    max_header_bytes: int = 16 << 20
    max_tensors: int = 100_000
    max_tensor_name: int = 512  # characters
    allow_pickles: bool = False  # adapter_model.bin, converted when it is published


DEFAULT_LIMITS = Limits()
