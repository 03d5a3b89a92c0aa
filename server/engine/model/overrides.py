"""What resident adapters put in the place of modules' own parameters, and which rows of a step.

Norms, heads, embeddings and whole layers that were trained with an adapter are not low-rank edits.
Their tensors lie in the adapter's arena like the rest, and the modules run once more for the rows
of each such adapter. All is decided on the host, once a step; a step without such rows pays
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.kernels import Plan
from manylora.server.engine.packing import PackedOverride


@dataclass(slots=True, frozen=True, eq=False)
class Override:
    """One adapter's own tensors for one module, views into the pool; see `ModuleEdit`.

    a, b, out_scale: an embedding's edit; scale: of its low-rank part.
    """

    weight: Tensor | None = None
    own_bias: Tensor | None = None
    token_ids: Tensor | None = None
    token_rows: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    out_scale: Tensor | None = None
    scale: float = 1.0

    def parameters(self) -> dict[str, Tensor]:
        """What takes the place of a norm's parameters, by their names."""
        named = {"weight": self.weight, "bias": self.own_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def embed(self, y: Tensor, ids: Tensor, factor: float) -> Tensor:
        """The adapter's embedding of int64 [n] ids. y: [n, hidden], the base's. factor: the
        module's own."""
        if self.weight is not None:
            y = F.embedding(ids, self.weight) * factor
        if self.token_ids is not None and self.token_rows is not None:
            at = torch.searchsorted(self.token_ids, ids).clamp_(max=len(self.token_ids) - 1)
            replaced = (self.token_ids[at] == ids)[:, None]
            y = torch.where(replaced, self.token_rows[at] * factor, y)
        if self.a is not None and self.b is not None:
            low_rank = self.a[:, ids].T.float() @ self.b.T.float()
            wide = y.float() if self.out_scale is None else y * self.out_scale
            y = (wide + low_rank * (self.scale * factor)).to(y.dtype)
        return y

    def multiply(self, y: Tensor, x: Tensor) -> Tensor:
        """The adapter's own product of x [n, in]. y: [n, out], the base's."""
        if self.weight is not None:
            y = F.linear(x, self.weight, self.own_bias)
        if self.token_ids is not None and self.token_rows is not None:
            y = y.index_copy(1, self.token_ids, x @ self.token_rows.T)
        return y


RowsOverrides: TypeAlias = Sequence[tuple[Tensor, Override]]
"""(int64 rows on the device, what they run on), of one module."""

StepOverrides: TypeAlias = Mapping[int, RowsOverrides]
"""One step's, by module id; empty in most steps."""

NO_OVERRIDES: StepOverrides = {}


class Overrides:
    """Of every slot, by module id; written beside the slot's row of the edit table."""

    def __init__(self) -> None:
        self._slots: dict[int, Mapping[int, Override]] = {}

    def write(
        self, slot: int, packed: Mapping[int, PackedOverride], pool: Tensor, start: int
    ) -> None:
        """Replaces the slot's. start: of the adapter's arena, in elements of the pool."""
        self.clear(slot)
        if packed:
            self._slots[slot] = {
                module: Override(
                    **{name: t.view(pool, start) for name, t in override.tensors.items()},
                    scale=override.scale,
                )
                for module, override in packed.items()
            }

    def clear(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def of(self, plan: Plan) -> StepOverrides:
        """What the plan's rows run on."""
        if not self._slots or plan.empty:
            return NO_OVERRIDES
        found: dict[int, list[tuple[Tensor, Override]]] = {}
        for slot in sorted(self._slots.keys() & set(plan.slots.tolist())):
            rows = torch.from_numpy(plan.rows_of(slot)).to(plan.words.device)
            for module, override in self._slots[slot].items():
                found.setdefault(module, []).append((rows, override))
        return found
