"""What an adapter puts before every prompt: virtual tokens, or keys and values.

They are tokens of the sequence, with ids below zero (-1, -2, …): the prefix cache shares their
blocks among all sequences of the adapter, their positions count from 0, and the prompt's follow.
The model embeds virtual tokens out of the adapter's arena; keys and values are copied from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manylora.adapters_store.edits import LoweredAdapter, ModuleKind
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.errors import FailedPrecondition
from manylora.kernels import make_batch
from manylora.server.engine.model import AdaptedModel, EncoderModel, VirtualRows
from manylora.server.engine.packing import PackedPrefix
from manylora.server.engine.pool import Arena


@dataclass(slots=True, frozen=True)
class Prefix:
    """A resident adapter's; its arena may move between two steps."""

    packed: PackedPrefix
    arena: Arena

    @property
    def tokens(self) -> int:
        return self.packed.tokens

    def offset(self, token: int) -> int:
        """Where the token's row begins, in elements of the pool."""
        return self.arena.start + self.packed.start + token * self.packed.width


def token_ids(prefix: Prefix | None) -> list[int]:
    return [] if prefix is None else list(range(-1, -prefix.tokens - 1, -1))


def virtual_rows(
    prefixes: Iterable[tuple[int, range, Prefix]], device: torch.device
) -> VirtualRows | None:
    """What the embedding must be told of one step.

    prefixes: of each sequence that has virtual tokens among its rows, its first row in the flat
    batch and which of its tokens these rows are.
    """
    rows: list[int] = []
    offsets: list[int] = []
    for row, tokens, prefix in prefixes:
        rows += range(row, row + len(tokens))
        offsets += map(prefix.offset, tokens)
    if not rows:
        return None
    return VirtualRows(torch.tensor(rows, device=device), torch.tensor(offsets, device=device))


def keys_values(pool: Tensor, prefix: Prefix, first: int, layers: int) -> Tensor:
    """Those of tokens `first` onward, where they lie: [tokens, layers, 2, kv_heads * head_dim]."""
    begin, end = prefix.offset(first), prefix.offset(prefix.tokens)
    return pool[begin:end].view(prefix.tokens - first, layers, 2, -1)


def write_prefix(
    model: AdaptedModel, block_size: int, prefix: Prefix, blocks: Sequence[int], first: int
) -> None:
    """Copies the keys and values of tokens `first` onward into a sequence's blocks."""
    step, count = model.step, prefix.tokens - first
    rows = keys_values(step.pool, prefix, first, len(model.layers))
    batch = make_batch(
        np.array([count], np.int32),
        np.array([prefix.tokens], np.int32),
        np.array([blocks], np.int32),
        block_size,
        rows.device,
    )
    for i, layer in enumerate(model.layers):
        k, v = rows[:, i].view(count, 2, layer.call.kv_heads, layer.call.head_dim).unbind(1)
        step.kernels.write_kv(k, v, layer.k_cache, layer.v_cache, batch)


def check_prefix(
    lowered: LoweredAdapter, model: AdaptedModel | EncoderModel, max_context: int
) -> None:
    """Raises FailedPrecondition if what comes before the prompts does not fit the base."""
    field = f"{WEIGHTS_FILE}: prompt_embeddings"
    given: Tensor | None = lowered.virtual_tokens
    if lowered.virtual_tokens is not None:
        if not any(shape.kind is ModuleKind.EMBEDDING for shape in model.modules.values()):
            raise FailedPrecondition(
                "this base's embedding cannot take rows of an adapter's own", field=field
            )
        wanted: tuple[int, ...] = (model.embedding_width,)
        found = tuple(lowered.virtual_tokens.shape[1:])
    elif lowered.prefix is not None:
        given = lowered.prefix
        sizes = {heads * dim for heads, dim in model.kv_layout}
        if not sizes:
            raise FailedPrecondition(
                "peft puts no keys and values before this base",
                field=f"{CONFIG_FILE}: peft_type",
                wanted="virtual tokens, or another method",
            )
        wanted = (len(model.kv_layout), 2, max(sizes))
        found = tuple(given.shape[1:])
        if len(sizes) > 1:
            raise FailedPrecondition(
                "layers of this base have keys of different sizes", field=field, found=sorted(sizes)
            )
    if given is None:
        return
    if found != wanted:
        raise FailedPrecondition(
            "the rows do not fit the base", field=field, found=list(found), wanted=str(list(wanted))
        )
    if len(given) >= max_context - 1:
        raise FailedPrecondition(
            "there is no room for a prompt behind these tokens",
            field=field,
            found=f"{len(given)} tokens",
            wanted=f"a context of {max_context} tokens to hold more",
        )
