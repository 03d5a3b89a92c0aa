"""Which modules of the base share the embedding's weight."""

from __future__ import annotations

from collections.abc import Mapping

from manylora.adapters_store.edits import ModuleKind, ModuleShape


def tied_modules(module: str, modules: Mapping[str, ModuleShape]) -> list[str]:
    """Other modules whose weight is the embedding's own; none if `module` is no embedding."""
    if modules[module].kind is not ModuleKind.EMBEDDING:
        return []
    return [name for name, shape in modules.items() if shape.tied]
