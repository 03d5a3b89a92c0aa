"""Which modules of the base share the embedding's weight."""

from __future__ import annotations

from collections.abc import Mapping

from manylora.adapters_store.edits import ModuleKind, ModuleShape
from manylora.adapters_store.lowering.base_copies import BaseParameter


def tied_modules(
    module: str, modules: Mapping[str, ModuleShape], parameter: BaseParameter | None
) -> list[str]:
    """Other modules whose weight is the embedding's own; none if `module` is no embedding."""
    shape = modules[module]
    weight = None if parameter is None else parameter(f"{module}.weight")
    if weight is None or parameter is None or shape.kind is not ModuleKind.EMBEDDING:
        return []
    like = ModuleShape(ModuleKind.LINEAR, shape.out_size, shape.in_size)
    candidates = ((name, parameter(f"{name}.weight")) for name, s in modules.items() if s == like)
    return [
        name
        for name, other in candidates
        if other is not None and other.data_ptr() == weight.data_ptr()
    ]
