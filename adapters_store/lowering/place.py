"""One module of the base, and one adapter's tensors for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleKind, ModuleShape
from manylora.adapters_store.lowering.base_copies import BaseParameter
from manylora.errors import FailedPrecondition

_BLOCK_ROWS = 1024


@dataclass(slots=True, frozen=True)
class Sizes:
    """A module's sizes; None where there is no base to ask."""

    inputs: int | None = None
    outputs: int | None = None


@dataclass(slots=True, frozen=True)
class Place:
    """tensors: by part; shared: the adapter's own, by name; both in the file's dtypes, checked.
    rank: of the method's tensors for this module."""

    name: str
    shape: ModuleShape
    tensors: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor]
    parameter: BaseParameter | None
    rank: int

    def double(self, part: str) -> torch.Tensor:
        return self.tensors[part].double()

    def own(self, leaf: str) -> torch.Tensor | None:
        """The base's own parameter of the module, wherever it lies; None if it has none."""
        return None if self.parameter is None else self.parameter(f"{self.name}.{leaf}")

    def weight(self) -> torch.Tensor:
        """The base's own weight, [out, in], float32 on the host; not to be changed.

        Raises FailedPrecondition if the base was not given, or has its weight in another form.
        """
        weight = self.own("weight")
        if weight is None or not weight.is_floating_point():
            raise FailedPrecondition(
                "this method needs the base's own weight",
                field=f"{self.name}.weight",
                found="nothing" if weight is None else str(weight.dtype),
                wanted="a base in float32, float16 or bfloat16",
            )
        own = weight.detach().cpu().float()
        lies_across = self.shape.kind in (ModuleKind.CONV1D, ModuleKind.EMBEDDING)
        return own.T if lies_across else own

    def row_blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """`weight` in float64, some rows at a time: the whole of a head's takes gigabytes."""
        weight = self.weight()
        for start in range(0, len(weight), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            yield rows, weight[rows].double()

    def bias(self) -> torch.Tensor | None:
        """The base's own bias, [out], float64 on the host; None if the module has none."""
        bias = self.own("bias")
        return None if bias is None else bias.detach().cpu().double()
