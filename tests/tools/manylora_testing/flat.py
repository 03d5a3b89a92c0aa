"""Drives an adapted model directly: many sequences, in flat batches, without the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manylora.adapters_store.format import read_checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering import lower
from manylora.kernels import Backend, EditTable, make_batch, make_plan
from manylora.kernels.attention import row_positions
from manylora.server.engine.invocation import acts_from
from manylora.server.engine.model import AdaptedModel, StepInputs
from manylora.server.engine.packing import PackedAdapter, pack
from manylora.server.engine.pool import Arena
from manylora.server.engine.prefix import Prefix, token_ids, virtual_rows, write_prefix


@dataclass
class Stream:
    """One sequence: adapter None is the base. rows: logits float32 [vocab] by position behind the
    adapter's own tokens, of every position if `watched`, else of the prompt's last and all
    generated ones. before: how many tokens are the adapter's own. acts_from: how many it leaves
    alone."""

    adapter: str | None
    prompt: list[int]
    watched: bool = False
    starts_at: int = 0
    done: int = 0
    before: int = 0
    acts_from: int = 0
    tokens: list[int] = field(default_factory=list)
    rows: dict[int, Tensor] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.before + len(self.prompt) :]


class FlatRunner:
    """Holds adapters in a pool and runs streams greedily, prefill chunks mixed with decodes."""

    def __init__(
        self,
        model: AdaptedModel,
        adapters: Mapping[str, Path],
        backend: Backend,
        *,
        block_size: int = 16,
        blocks: int = 64,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self._free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.slots = {name: 2 * i + 1 for i, name in enumerate(reversed(list(adapters)))}
        self.prefixes: dict[str, Prefix] = {}
        self.invocations: dict[str, tuple[int, ...]] = {}
        self._fill_pool(adapters, backend)
        shapes = [(blocks, heads, block_size, dim) for heads, dim in model.kv_layout]
        # what a block held before must not matter, so the caches start full of nonsense
        model.attach_cache(
            [
                (torch.full(s, 7e3, dtype=model.dtype), torch.full(s, 7e3, dtype=model.dtype))
                for s in shapes
            ]
        )

    def run(self, streams: Sequence[Stream], *, chunk: int, new_tokens: int) -> None:
        """Runs until each stream has its prompt's and `new_tokens` more tokens' logits."""
        for stream in streams:
            self._begin(stream)
        step = 0
        while True:
            live = [s for s in streams if len(s.generated) < new_tokens]
            if not live:
                return
            chunks = [(s, self._next(s, chunk)) for s in live if s.starts_at <= step]
            if chunks:
                self._step(chunks)
            step += 1

    def decode(self, streams: Sequence[Stream]) -> None:
        """One more token of streams that have run."""
        self._step([(stream, self._next(stream, 1)) for stream in streams])

    def give_back(self, stream: Stream) -> None:
        """The blocks of a stream that has run."""
        self._free += stream.blocks
        stream.blocks = []

    def grow(self, stream: Stream, positions: int) -> None:
        """Gives the stream the blocks that so many positions want."""
        while len(stream.blocks) < -(-positions // self.block_size):
            stream.blocks.append(self._free.pop())

    def _begin(self, stream: Stream) -> None:
        prefix = self.prefixes.get(stream.adapter or "")
        own = token_ids(prefix)
        stream.before = len(own)
        stream.acts_from = acts_from(self.invocations.get(stream.adapter or "", ()), stream.prompt)
        stream.tokens = own + stream.prompt
        if prefix is not None and prefix.packed.keys_values:
            self.grow(stream, stream.before)
            write_prefix(self.model, self.block_size, prefix, stream.blocks, 0)
            stream.done = stream.before

    def _next(self, stream: Stream, chunk: int) -> int:
        """How many rows the stream has in the next step."""
        count = min(chunk, len(stream.tokens) - stream.done)
        self.grow(stream, stream.done + count)
        return count

    def _step(self, chunks: list[tuple[Stream, int]]) -> None:
        counts = np.array([count for _, count in chunks], np.int32)
        ends = np.array([s.done + count for s, count in chunks], np.int32)
        sampled = self._sampled(chunks)
        slots = np.array([slot for s, n in chunks for slot in self._slots(s, n)], np.int32)
        logits = self.model.forward(
            StepInputs(
                token_ids=torch.tensor(
                    [max(t, 0) for s, n in chunks for t in s.tokens[s.done : s.done + n]]
                ),
                positions=torch.from_numpy(row_positions(counts, ends)),
                plan=make_plan(slots),
                head_plan=make_plan(slots[[row for _, _, row in sampled]]),
                attention=make_batch(counts, ends, self._block_table(chunks), self.block_size),
                sample_rows=torch.tensor([row for _, _, row in sampled], dtype=torch.long),
                virtual=virtual_rows(self._virtual(chunks), torch.device("cpu")),
            )
        )
        for (i, position, _), row in zip(sampled, logits, strict=True):
            chunks[i][0].rows[position - chunks[i][0].before] = row
        for stream, count in chunks:
            stream.done += count
            if stream.done == len(stream.tokens):
                stream.tokens.append(int(stream.rows[stream.done - 1 - stream.before].argmax()))

    def _slots(self, stream: Stream, count: int) -> list[int]:
        """Of the stream's next rows."""
        slot = self.slots.get(stream.adapter or "", -1)
        rows = range(stream.done, stream.done + count)
        return [slot if row >= stream.acts_from else -1 for row in rows]

    def _virtual(self, chunks: list[tuple[Stream, int]]) -> Iterator[tuple[int, range, Prefix]]:
        row = 0
        for stream, count in chunks:
            if stream.done < stream.before:
                end = min(stream.done + count, stream.before)
                yield row, range(stream.done, end), self.prefixes[stream.adapter or ""]
            row += count

    def _sampled(self, chunks: list[tuple[Stream, int]]) -> list[tuple[int, int, int]]:
        """(stream, position, flat row) of each row whose logits are wanted."""
        sampled: list[tuple[int, int, int]] = []
        start = 0
        for i, (stream, count) in enumerate(chunks):
            ends_prompt = stream.done + count == len(stream.tokens)
            first = 0 if stream.watched else count - int(ends_prompt)
            first = max(first, stream.before - stream.done)
            sampled += [(i, stream.done + j, start + j) for j in range(first, count)]
            start += count
        return sampled

    def _block_table(self, chunks: list[tuple[Stream, int]]) -> np.ndarray:
        table = np.zeros((len(chunks), max(len(s.blocks) for s, _ in chunks)), np.int32)
        for row, (stream, _) in zip(table, chunks, strict=True):
            row[: len(stream.blocks)] = stream.blocks
        return table

    def _fill_pool(self, adapters: Mapping[str, Path], backend: Backend) -> None:
        modules = self.model.modules
        ids = {name: i for i, name in enumerate(modules)}
        table = EditTable(2 * len(adapters) + 1, len(modules))
        buffers: list[Tensor] = [torch.full((64,), torch.nan, dtype=self.model.dtype)]
        placed: list[tuple[int, PackedAdapter, int]] = []
        for name, directory in adapters.items():
            lowered = lower(read_checkpoint(directory, Limits()), modules, self.model.parameter)
            packed = pack(lowered, ids, backend, self.model.dtype)
            start = sum(buffer.numel() for buffer in buffers)
            table.write(self.slots[name], packed.rank, packed.scale, packed.offsets_at(start))
            buffers.append(packed.buffer)
            placed.append((self.slots[name], packed, start))
            self.invocations[name] = packed.invocation
            if packed.prefix is not None:
                self.prefixes[name] = Prefix(packed.prefix, Arena(start, packed.buffer.numel()))
        self.model.bind(torch.cat(buffers), table)
        for slot, packed, start in placed:
            self.model.step.overrides.write(slot, packed.overrides, self.model.step.pool, start)
