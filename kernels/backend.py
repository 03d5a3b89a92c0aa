"""Which implementation of the kernels serves a device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import torch

from manylora.kernels import cpu, reference
from manylora.kernels.attention import AttentionBatch
from manylora.kernels.plan import Plan
from manylora.kernels.stack import RankStack
from manylora.kernels.table import EditTable, SliceGroup

BACKENDS = ("reference", "cpu", "triton")


class Backend(Protocol):
    """What every backend module offers; the reference says what each function means."""

    @property
    def NAME(self) -> str: ...  # noqa: N802

    def pack_a(self, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def pack_b(self, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def pack_factors(
        self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype, before: int
    ) -> tuple[torch.Tensor, np.ndarray]: ...

    def apply_edits_(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        group: SliceGroup,
        pool: torch.Tensor,
        table: EditTable,
        plan: Plan,
    ) -> None: ...

    def scale_inputs(
        self,
        x: torch.Tensor,
        group: SliceGroup,
        pool: torch.Tensor,
        table: EditTable,
        plan: Plan,
    ) -> torch.Tensor: ...

    def add_low_rank_(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        bt: torch.Tensor,
        stack: RankStack,
        plan: Plan,
    ) -> None: ...

    def low_rank_backward_(
        self,
        dx: torch.Tensor,
        da: torch.Tensor,
        dbt: torch.Tensor,
        dy: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        bt: torch.Tensor,
        stack: RankStack,
        plan: Plan,
    ) -> None: ...

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> None: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor | None = None,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def rotary_write_kv(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...

    def gelu_mul(self, gate_up: torch.Tensor, approximate: str = "none") -> torch.Tensor: ...


def select(device: torch.device | str, name: str | None = None) -> Backend:
    """The backend for tensors on `device`, or the one called `name`.

    Without a name, the reference stands in, with one loud warning, where the fast kernels are
    missing. With a name, nothing stands in.

    Raises:
        ValueError: an unknown name, or a named backend that this installation or device lacks.
    """
    if name is not None:
        return _named(name)
    fast = "cpu" if torch.device(device).type == "cpu" else "triton"
    reason = _missing(fast)
    if reason is None:
        return _named(fast)
    _warn_once(fast, reason)
    return cast(Backend, reference)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A large tensor that steps read from one end to the other; what is in it is undefined."""
    if device.type == "cpu":
        return cpu.huge_empty(shape, dtype)
    return torch.empty(*shape, dtype=dtype, device=device)


def side_by_side(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Tensors as `empty` gives them, in one piece of memory: a few huge pages hold many of them.
    Each begins on a cache line."""
    line = 64 // dtype.itemsize
    numels = [torch.Size(shape).numel() for shape in shapes]
    rooms = [-(-numel // line) * line for numel in numels]
    parts = torch.split(empty([sum(rooms)], dtype, device), rooms)
    return [
        part[:numel].view(*shape) for part, numel, shape in zip(parts, numels, shapes, strict=True)
    ]


def _named(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"kernels: found {name!r}; wanted one of {', '.join(BACKENDS)}")
    reason = _missing(name)
    if reason is not None:
        raise ValueError(f"kernels: {name!r} cannot be used here: {reason}")
    return cast(Backend, importlib.import_module(f"manylora.kernels.{name}"))


def _missing(name: str) -> str | None:
    """Why a backend cannot be used here, or None."""
    if name == "cpu":
        return None if cpu.available() else cpu.why_unavailable()
    if name == "triton":
        return _missing_triton()
    return None


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; the extra manylora[gpu] has it"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "there is no GPU, and TRITON_INTERPRET=1, which runs the kernels without one, is not set"


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"the fast {name!r} kernels are missing, so the plain torch reference runs instead, "
        f"which is many times slower: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
