"""KV blocks: whose they are, what they hold, and in which order they go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from manylora.server.engine.blocks import BlockList, BlockManager
from manylora.server.engine.invocation import NEVER

SIZE = 3
TOTAL = 6
DIGESTS = ("", "a", "b")
# made of two blocks only, so that prefixes meet often
BLOCKS = st.lists(st.sampled_from([(0, 0, 0), (1, 1, 1)]), max_size=3)
TOKENS = st.tuples(BLOCKS, st.lists(st.integers(0, 1), min_size=1, max_size=2)).map(
    lambda drawn: [*(token for block in drawn[0] for token in block), *drawn[1]]
)


Truth = tuple[str, int, tuple[int, ...]]


@dataclass(eq=False)
class Running:
    digest: str
    base: int
    tokens: list[int]
    blocks: BlockList
    computed: int

    def truth(self, position: int) -> Truth:
        """What the K and V there depend on: all tokens up to there, and who acted on them."""
        tokens = tuple(self.tokens[: position + 1])
        return ("", 0, tokens) if position < self.base else (self.digest, self.base, tokens)


class Blocks(RuleBasedStateMachine):
    """Beside the manager, the truth: what was written at every position of every block."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(TOTAL, SIZE)
        self.written: dict[tuple[int, int], Truth] = {}
        self.alive: list[Running] = []

    @rule(
        target=sequences,
        digest=st.sampled_from(DIGESTS),
        tokens=TOKENS,
        base=st.sampled_from([0, 0, 0, 1, 2, 3, 4, 6, NEVER]),
    )
    def start(self, digest: str, tokens: list[int], base: int) -> Running:
        blocks, computed = self.manager.start(digest, tokens, base=base)
        assert computed == len(blocks.blocks) * SIZE
        assert computed < len(tokens), "the last token's logits are wanted"
        sequence = Running(digest, base, list(tokens), blocks, computed)
        self.alive.append(sequence)
        self.check_content(sequence)
        return sequence

    @rule(sequence=sequences, count=st.integers(1, 10))
    def compute(self, sequence: Running, count: int) -> None:
        end = min(sequence.computed + count, len(sequence.tokens))
        free, held = self.manager.free, list(sequence.blocks.blocks)
        if not self.manager.grow(sequence.blocks, end):
            assert sequence.blocks.blocks == held
            assert self.manager.free == free < self.manager.blocks_for(end) - len(held)
            return
        assert len(sequence.blocks.blocks) == max(len(held), self.manager.blocks_for(end))
        users = self.users()
        for position in range(sequence.computed, end):
            block = sequence.blocks.blocks[position // SIZE]
            assert users[block] == 1, "a block that others read is written to"
            place = (block, position % SIZE)
            self.written[place] = sequence.truth(position)
        sequence.computed = end
        self.manager.register(sequence.blocks, sequence.tokens, end)

    @rule(sequence=sequences, token=st.integers(0, 1))
    def extend(self, sequence: Running, token: int) -> None:
        if sequence.computed == len(sequence.tokens):
            sequence.tokens.append(token)

    @rule(sequence=consumes(sequences))
    def release(self, sequence: Running) -> None:
        self.manager.release(sequence.blocks)
        assert sequence.blocks.blocks == []
        self.alive.remove(sequence)

    def users(self) -> Counter[int]:
        return Counter(block for s in self.alive for block in s.blocks.blocks)

    def check_content(self, sequence: Running) -> None:
        for position in range(sequence.computed):
            place = (sequence.blocks.blocks[position // SIZE], position % SIZE)
            assert self.written[place] == sequence.truth(position)

    @invariant()
    def every_block_is_held_or_free(self) -> None:
        assert self.manager.free + len(self.users()) == TOTAL

    @invariant()
    def no_block_twice_in_a_sequence(self) -> None:
        for sequence in self.alive:
            assert len(set(sequence.blocks.blocks)) == len(sequence.blocks.blocks)

    @invariant()
    def what_a_sequence_reads_is_its_own(self) -> None:
        for sequence in self.alive:
            self.check_content(sequence)

    def teardown(self) -> None:
        for sequence in self.alive:
            self.manager.release(sequence.blocks)
        assert self.manager.free == TOTAL
        everything = BlockList(parent="all")
        assert self.manager.grow(everything, TOTAL * SIZE)
        assert sorted(everything.blocks) == list(range(TOTAL))


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def run(manager: BlockManager, digest: str, tokens: list[int]) -> tuple[list[int], int]:
    """One sequence from start to end: its blocks, and how many tokens were cached."""
    blocks, cached = manager.start(digest, tokens)
    assert manager.grow(blocks, len(tokens))
    manager.register(blocks, tokens, len(tokens))
    held = list(blocks.blocks)
    manager.release(blocks)
    return held, cached


def test_the_longest_cached_prefix_is_found() -> None:
    manager = BlockManager(TOTAL, SIZE)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    first, _ = run(manager, "a", prompt)
    assert run(manager, "a", prompt) == (first, 6)
    assert run(manager, "a", prompt[:6])[1] == 3, "the last token is always computed"
    assert run(manager, "a", [1, 2, 3, 9, 9, 9, 9])[1] == 3
    assert run(manager, "b", prompt)[1] == 0, "another adapter's cache"
    assert run(manager, "", prompt)[1] == 0


def test_blocks_before_an_adapter_acts_are_the_bases() -> None:
    manager = BlockManager(12, SIZE)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]

    def cached(digest: str, base: int) -> int:
        blocks, cached = manager.start(digest, prompt, base=base)
        assert manager.grow(blocks, len(prompt))
        manager.register(blocks, prompt, len(prompt))
        manager.release(blocks)
        return cached

    assert cached("", 0) == 0
    assert cached("a", 4) == 3
    assert cached("a", 4) == 9
    assert cached("a", 5) == 3, "from another token on"
    assert cached("b", 4) == 3, "another adapter"
    assert cached("a", 6) == 6, "from a block's first token on"
    assert cached("a", NEVER) == 9
    assert cached("a", 0) == 0, "an adapter that always acts"


def test_a_running_sequence_shares_its_blocks() -> None:
    manager = BlockManager(TOTAL, SIZE)
    prompt = [1, 2, 3, 4]
    first, _ = manager.start("a", prompt)
    manager.grow(first, 4)
    manager.register(first, prompt, 4)
    second, cached = manager.start("a", prompt)
    assert cached == 3
    assert second.blocks == first.blocks[:1]
    assert manager.free == TOTAL - 2
    manager.release(first)
    assert manager.free == TOTAL - 1
    manager.release(second)
    assert manager.free == TOTAL


def test_what_follows_a_twin_is_found_below_it_alone() -> None:
    """Two compute the same first block at once; the second's next block is no first block."""
    manager = BlockManager(TOTAL, SIZE)
    first, _ = manager.start("", [1, 1, 1])
    second, _ = manager.start("", [1, 1, 1, 2, 2, 2])
    manager.grow(first, 3)
    manager.grow(second, 6)
    manager.register(first, [1, 1, 1], 3)
    manager.register(second, [1, 1, 1, 2, 2, 2], 6)
    assert manager.start("", [2, 2, 2, 0])[1] == 0
    assert manager.start("", [1, 1, 1, 2, 2, 2, 0])[1] == 6


def test_unused_blocks_go_before_cached_ones_and_ends_before_prefixes() -> None:
    manager = BlockManager(6, SIZE)
    old = list(range(6))
    new = [10, 11, 12, 13, 14, 15]
    run(manager, "", old)
    run(manager, "", new)
    blocks = BlockList(parent="x")
    assert manager.grow(blocks, 2 * SIZE)  # the two that hold nothing
    assert manager.start("", [*new, 0])[1] == 6
    for expected in (3, 0):  # now the older one goes, its end first
        assert manager.grow(blocks, (len(blocks.blocks) + 1) * SIZE)
        probe, cached = manager.start("", [*old, 0])
        assert cached == expected
        manager.release(probe)


def test_use_makes_a_block_young_again() -> None:
    manager = BlockManager(2, SIZE)
    run(manager, "", [1, 1, 1])
    run(manager, "", [2, 2, 2])
    run_again, cached = manager.start("", [1, 1, 1, 0])
    assert cached == 3
    manager.release(run_again)
    fresh = BlockList(parent="x")
    manager.grow(fresh, SIZE)
    assert manager.start("", [1, 1, 1, 0])[1] == 3
    assert manager.start("", [2, 2, 2, 0])[1] == 0


def test_without_a_prefix_cache_nothing_is_found() -> None:
    manager = BlockManager(TOTAL, SIZE, prefix_cache=False)
    run(manager, "", [1] * 7)
    assert run(manager, "", [1] * 7)[1] == 0
    assert manager.free == TOTAL


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (3, 1), (4, 2)])
def test_blocks_for(positions: int, blocks: int) -> None:
    assert BlockManager(1, SIZE).blocks_for(positions) == blocks
