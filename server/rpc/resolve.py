"""What a request's `adapter` says → what the engine runs."""

from __future__ import annotations

import asyncio

from manylora.adapters_store.composition import (
    WeightedRef,
    check_weight,
    format_composition,
    parse_composition,
)
from manylora.adapters_store.store import Store
from manylora.server.engine.types import AdapterKey, WeightedPart


async def resolve_adapter(store: Store, text: str, field: str = "adapter") -> AdapterKey | None:
    """None for "", the base. The engine's key of one adapter, or of several with weights.

    Raises InvalidArgument, NotFound naming the adapter.
    """
    if not text:
        return None
    return await asyncio.to_thread(_resolve, store, text, field)


def _resolve(store: Store, text: str, field: str) -> AdapterKey:
    terms = parse_composition(text, field)
    parts: dict[str, WeightedPart] = {}
    for term in terms:
        version = store.resolve(term.ref, field)
        known = parts.get(version.label)
        weight = term.weight if known is None else known.weight + term.weight
        parts[version.label] = WeightedPart(version.digest, version.label, weight)
    for part in parts.values():  # two names may stand for the same version
        check_weight(part.weight, f"{field} (weight)")
    return composition_key(tuple(parts.values()))


def composition_key(parts: tuple[WeightedPart, ...]) -> AdapterKey:
    """parts: of different versions. The key's digest has theirs and their weights in full, so no
    two sums of different adapters or weights, and no sum and an adapter, ever share a cache."""
    if len(parts) == 1 and parts[0].weight == 1:
        return AdapterKey(parts[0].digest, parts[0].label)
    ordered = tuple(sorted(parts, key=lambda part: part.label))
    return AdapterKey(
        digest=format_composition(WeightedRef(part.digest, part.weight) for part in ordered),
        label=format_composition(WeightedRef(part.label, part.weight) for part in ordered),
        parts=ordered,
    )
