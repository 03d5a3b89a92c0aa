"""What a model's configuration says about lengths and ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

_LENGTHS = ("max_position_embeddings", "seq_length", "max_seq_len", "n_positions")
_UNSTATED = 2048


def max_context(config: PreTrainedConfig) -> int:
    """Tokens that a sequence may have, so that its result depends on nothing but itself.

    transformers' "longrope" picks its frequencies by the longest sequence of a batch: up to the
    original length they are the short ones for every row, so that is where the context ends.
    ("dynamic" changes beyond max_position_embeddings, where the context ends anyway.)
    """
    text = config.get_text_config(decoder=True)
    stated = [getattr(text, name, None) for name in _LENGTHS]
    length = next((int(value) for value in stated if value), _UNSTATED)
    for rope in _rope_parameters(text):
        if rope.get("rope_type") == "longrope":
            length = min(length, int(rope["original_max_position_embeddings"]))
    return length


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Ids that end a generation: of the generation config, else of the model's config."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list | tuple) else (int(ids),)


def _rope_parameters(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """One mapping, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return []
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]
