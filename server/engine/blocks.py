"""KV-cache blocks: reference counts and the prefix cache.

A block that is full never changes again, so sequences may share it. The prefix cache finds a
full block by (its parent block, its tokens); the parent of a sequence's first block is the
adapter's digest, so no adapter ever reads another's cache. Where an adapter acts from some token
on only, the blocks before are the base's, and shared with it; the first block that it acts in has
the digest and that token's position in its key. Keys are compared whole, not by hash: a collision
would show one customer's cache to another.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

# The adapter's digest ("" for the base) above a first block, else the parent block's node; with
# digest and position where an adapter begins to act in the block.
Parent = str | int | tuple[str | int, str, int]
Key = tuple[Parent, tuple[int, ...]]


@dataclass(slots=True)
class BlockList:
    """One sequence's blocks, in order, and how far the prefix cache knows them."""

    parent: str | int
    blocks: list[int] = field(default_factory=list)
    digest: str = ""
    base: int = 0  # leading tokens whose keys and values are the base's, not the adapter's
    registered: int = 0  # leading blocks that the prefix cache knows
    shared: int = sys.maxsize  # leading tokens whose full blocks may be shared


class BlockManager:
    """Hands out the KV cache's blocks.

    Args:
        total: blocks there are.
        block_size: positions in a block.
        prefix_cache: share prompts' and answers' full blocks, and keep them findable after their
            sequence has ended; without, only those of the adapters' own tokens.
    """

    def __init__(self, total: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.total = total
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self._references = [0] * total
        self._unused = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, used by nobody; oldest first
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._node_of: dict[int, int] = {}
        self._next_node = 0

    @property
    def free(self) -> int:
        return len(self._unused) + len(self._idle)

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def start(
        self, digest: str, tokens: Seq[int], own: int = 0, base: int = 0
    ) -> tuple[BlockList, int]:
        """A new sequence's blocks: the longest cached prefix of `tokens`, short of the last
        token (its logits are wanted). Returns the list and the number of tokens it covers.

        own: how many leading tokens are the adapter's own. base: on how many it does not act.
        """
        blocks = BlockList("" if base else digest, digest=digest, base=base)
        blocks.shared = sys.maxsize if self._prefix_cache else own
        last = min(len(tokens) - 1, blocks.shared)
        for end in range(self.block_size, last + 1, self.block_size):
            block = self._block_of.get(self._key(blocks, tokens, end))
            if block is None:
                break
            self._take(block)
            blocks.blocks.append(block)
            blocks.parent = self._node_of[block]
        blocks.registered = len(blocks.blocks)
        return blocks, blocks.registered * self.block_size

    def grow(self, blocks: BlockList, positions: int) -> bool:
        """Makes room for `positions` in all; False, and nothing taken, if blocks are short."""
        need = self.blocks_for(positions) - len(blocks.blocks)
        if need > self.free:
            return False
        for _ in range(need):
            blocks.blocks.append(self._fresh())
        return True

    def register(self, blocks: BlockList, tokens: Seq[int], computed: int) -> None:
        """Tells the prefix cache of the blocks that are now full: `computed` of `tokens` are in
        the cache."""
        size = self.block_size
        for i in range(blocks.registered, min(computed, blocks.shared) // size):
            key = self._key(blocks, tokens, (i + 1) * size)
            twin = self._block_of.get(key)
            if twin is None:
                block = blocks.blocks[i]
                self._block_of[key] = block
                self._key_of[block] = key
                self._node_of[block] = self._next_node
                blocks.parent = self._next_node
                self._next_node += 1
            else:
                blocks.parent = self._node_of[twin]
            blocks.registered = i + 1

    def release(self, blocks: BlockList) -> None:
        """Gives a sequence's blocks back, its last first, so that prefixes outlive their ends."""
        for block in reversed(blocks.blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._unused.append(block)
        blocks.blocks.clear()

    def _key(self, blocks: BlockList, tokens: Seq[int], end: int) -> Key:
        """Of the block that ends before token `end`, whose parent is the list's."""
        start = end - self.block_size
        parent: Parent = blocks.parent
        if blocks.base and start <= blocks.base < end:
            parent = (blocks.parent, blocks.digest, blocks.base)
        return parent, tuple(tokens[start:end])

    def _take(self, block: int) -> None:
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def _fresh(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            del self._node_of[block]
        self._references[block] = 1
        return block
