"""Which implementation of the kernels serves a device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Protocol, cast

import torch

from manylora.kernels import cpu, reference
from manylora.kernels.attention import AttentionBatch
from manylora.kernels.plan import Plan
from manylora.kernels.table import EditTable, SliceGroup

BACKENDS = ("reference", "cpu", "triton")


class Backend(Protocol):
    """What every backend module offers; the reference says what each function means."""

    @property
    def NAME(self) -> str: ...  # noqa: N802

    def pack_b(self, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def packed_b_numel(self, out: int, r: int, dtype: torch.dtype) -> int: ...

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
    if name == "triton" and importlib.util.find_spec("manylora.kernels.triton") is None:
        return "the Triton kernels are not part of this version"
    return None


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"the fast {name!r} kernels are missing, so the plain torch reference runs instead, "
        f"which is many times slower: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
