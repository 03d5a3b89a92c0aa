"""The edit table: what each resident adapter does to each module, and where its tensors lie."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

OFFSETS = ("a", "b", "in_scale", "out_scale", "bias")
"""The last dimension of `EditTable.offsets`."""

IN_SCALE = OFFSETS.index("in_scale")


@dataclass(frozen=True, slots=True)
class SliceGroup:
    """The modules that one call edits: module modules[j] owns y[:, starts[j]:starts[j] + sizes[j]].

    A packed projection (qkv, gate_up) has several, which all read the same x; a plain module is a
    group of one. Build it once and keep it.
    """

    modules: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    end: int = field(init=False, repr=False)
    max_module: int = field(init=False, repr=False)
    address: int = field(init=False, repr=False, compare=False)
    _words: ctypes.Array[ctypes.c_int32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        count = len(self.modules)
        given = f"modules {self.modules}, starts {self.starts}, sizes {self.sizes}"
        if not count or len(self.starts) != count or len(self.sizes) != count:
            raise ValueError(f"a slice group wants a start and a size a module; found {given}")
        if min(self.modules) < 0 or min(self.starts) < 0 or min(self.sizes) <= 0:
            raise ValueError(f"a slice is empty or negative; found {given}")
        words = (count, *self.modules, *self.starts, *self.sizes)
        array = (ctypes.c_int32 * len(words))(*words)
        ends = map(sum, zip(self.starts, self.sizes, strict=True))
        object.__setattr__(self, "end", max(ends))
        object.__setattr__(self, "max_module", max(self.modules))
        object.__setattr__(self, "_words", array)
        object.__setattr__(self, "address", ctypes.addressof(array))

    @classmethod
    def single(cls, module: int, out_size: int) -> SliceGroup:
        """The group of one plain module with `out_size` outputs."""
        return cls((module,), (0,), (out_size,))


class _HostView(ctypes.Structure):
    """The table as the C++ kernels see it (`Table` in kernels/cpu/edit_job.h)."""

    _fields_ = (
        ("slots", ctypes.c_int64),
        ("modules", ctypes.c_int64),
        ("rank", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


class EditTable:
    """What every slot does to every module. The tensors keep their addresses for life.

    Attributes:
        rank: int32 [slots, modules], 0 where there is no low-rank part.
        scale: float32 [slots, modules], factor of the low-rank part.
        offsets: int64 [slots, modules, 5], in elements of the pool, of A, B, in_scale, out_scale
            and bias; -1 where absent.
        in_scaled: bool [slots, modules] on the host: which have an in_scale.
        ranks: int32 [slots, modules], `rank` on the host.
        address: of a C view of the table, for kernels that run on the host.
    """

    def __init__(self, slots: int, modules: int, device: torch.device | str = "cpu") -> None:
        shape = (slots, modules)
        self._lie_on(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.full((*shape, len(OFFSETS)), -1, dtype=torch.int64, device=device),
        )
        self.in_scaled = np.zeros(shape, dtype=bool)
        self._in_scaled_modules: frozenset[int] = frozenset()
        self.ranks = np.zeros(shape, dtype=np.int32)
        self._max_ranks = [0] * modules

    @classmethod
    def on(
        cls, rank: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor, max_rank: int
    ) -> EditTable:
        """A table of the tensors that another one has, for one `apply_edits_`.

        max_rank: the other's, of the modules in question. What else is kept on the host is not
        there.
        """
        table = cls.__new__(cls)
        table._lie_on(rank, scale, offsets)
        table._max_ranks = [max_rank] * table.modules
        return table

    def _lie_on(self, rank: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> None:
        self.slots, self.modules = rank.shape
        self.rank, self.scale, self.offsets = rank, scale, offsets
        addresses = (rank.data_ptr(), scale.data_ptr(), offsets.data_ptr())
        self._view = _HostView(self.slots, self.modules, *addresses)
        self.address = ctypes.addressof(self._view)

    def clear(self, slot: int) -> None:
        """Makes the slot leave every module alone."""
        self.rank[slot] = 0
        self.offsets[slot] = -1
        self._keep_on_host(slot, np.int32(0), np.False_)

    def write(
        self,
        slot: int,
        rank: npt.NDArray[np.int32],
        scale: npt.NDArray[np.float32],
        offsets: npt.NDArray[np.int64],
    ) -> None:
        """Replaces the slot's row.

        Args:
            slot: which row.
            rank: int32 [modules].
            scale: float32 [modules].
            offsets: int64 [modules, 5].

        Raises:
            ValueError: wrong shapes, a negative rank, or a rank without A and B.
        """
        found = (rank.shape, scale.shape, offsets.shape)
        wanted = ((self.modules,), (self.modules,), (self.modules, len(OFFSETS)))
        if found != wanted:
            raise ValueError(f"rank, scale, offsets: found shapes {found}; wanted {wanted}")
        if (rank < 0).any() or (offsets[rank > 0, :IN_SCALE] < 0).any():
            raise ValueError("rank: found a negative one, or one without offsets of A and B")
        self.rank[slot] = torch.from_numpy(np.ascontiguousarray(rank))
        self.scale[slot] = torch.from_numpy(np.ascontiguousarray(scale))
        self.offsets[slot] = torch.from_numpy(np.ascontiguousarray(offsets))
        self._keep_on_host(slot, rank, offsets[:, IN_SCALE] >= 0)

    def scales_inputs(self, group: SliceGroup) -> bool:
        """Whether any slot has an in_scale for a module of the group. Costs no kernel."""
        return not self._in_scaled_modules.isdisjoint(group.modules)

    def max_rank(self, group: SliceGroup) -> int:
        """The highest rank that any slot has on a module of the group."""
        return max([self._max_ranks[module] for module in group.modules])

    def _keep_on_host(
        self,
        slot: int,
        rank: npt.NDArray[np.int32] | np.int32,
        in_scaled: npt.NDArray[np.bool_] | np.bool_,
    ) -> None:
        if (self.ranks[slot] == rank).all() and (self.in_scaled[slot] == in_scaled).all():
            return
        self.ranks[slot] = rank
        self._max_ranks = self.ranks.max(axis=0).tolist()
        self.in_scaled[slot] = in_scaled
        self._in_scaled_modules = frozenset(np.flatnonzero(self.in_scaled.any(axis=0)).tolist())
