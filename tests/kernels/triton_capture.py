"""A decode step on the Triton kernels can be captured as a CUDA graph: without a GPU, its recorded
operations and launches are run again at their addresses while sequences and adapters change.

Not collected by itself: test_triton.py runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from captured_step import Graph, capture
from manylora_testing import Oracle, tiny_lora, tiny_model
from manylora_testing.flat import FlatRunner, Stream

import manylora.kernels.triton as kernels
from manylora.kernels import AttentionBatch, PlanBuffer
from manylora.server.engine.model import AdaptedModel, StepInputs
from manylora.server.engine.model.load import load_model

ROWS, BLOCK, BLOCKS = 4, 16, 20  # of a sequence: more than one part of the keys
PROMPTS = {"few": 5, "all": 11, None: 3}
DECODE = {
    *("_shrink", "_expand", "_norm", "_activate"),
    *("_rotary_write_kv", "_attend", "_combine"),
}


class FixedInputs:
    """A decode step of up to ROWS sequences, in tensors that stay where they are."""

    def __init__(self, slots: int) -> None:
        self.plans = PlanBuffer(ROWS, slots), PlanBuffer(ROWS, slots)
        self.inputs = StepInputs(
            token_ids=torch.zeros(ROWS, dtype=torch.int64),
            positions=torch.zeros(ROWS, dtype=torch.int64),
            plan=self.plans[0].plan,
            head_plan=self.plans[1].plan,
            attention=AttentionBatch(
                seq_starts=torch.arange(ROWS + 1, dtype=torch.int32),
                context=torch.ones(ROWS, dtype=torch.int32),
                block_table=torch.zeros(ROWS, BLOCKS, dtype=torch.int32),
                slot_mapping=torch.full((ROWS,), -1, dtype=torch.int64),
                decodes=ROWS,
                chunks=0,
            ),
            sample_rows=torch.arange(ROWS),
        )

    def fill(self, rows: Sequence[Stream | None], runner: FlatRunner) -> None:
        """The next token of each stream; None is padding."""
        inputs, batch = self.inputs, self.inputs.attention
        slots = np.full(ROWS, -1, np.int32)
        for row, stream in enumerate(rows):
            position = 0 if stream is None else stream.done
            inputs.positions[row] = position
            batch.context[row] = position + 1
            batch.slot_mapping[row] = -1
            if stream is None:
                continue
            runner.grow(stream, position + 1)
            inputs.token_ids[row] = stream.tokens[position]
            batch.block_table[row, : len(stream.blocks)] = torch.tensor(stream.blocks)
            batch.slot_mapping[row] = stream.blocks[position // BLOCK] * BLOCK + position % BLOCK
            slots[row] = runner.slots.get(stream.adapter or "", -1)
        for plan in self.plans:
            plan.fill(slots)


class House:
    """A tiny model with two adapters, and three streams that have their first tokens."""

    def __init__(self, directory: Path) -> None:
        base = directory / "base"
        tiny_model("llama", base, max_position_embeddings=64)
        few = {"r": 3, "alpha": 4, "targets": ["q_proj", "down_proj"], "seed": 0}
        adapters = {
            "few": tiny_lora(base, directory / "few", **few),
            "all": tiny_lora(base, directory / "all", r=5, alpha=6, targets="all-linear", seed=1),
        }
        self.oracle = Oracle(base, adapters)
        self.model = load_model(base, "float32", torch.device("cpu"), kernels)
        self.runner = FlatRunner(self.model, adapters, kernels, block_size=BLOCK)
        self.streams = [
            Stream(adapter, [3 + (7 * i + n) % 90 for i in range(n)])
            for adapter, n in PROMPTS.items()
        ]
        self.runner.run(self.streams, chunk=16, new_tokens=1)
        self.fixed = FixedInputs(self.model.step.table.slots)

    def captured(self, rows: Sequence[Stream | None]) -> tuple[Graph, torch.Tensor]:
        """The graph of a decode step, and where its logits are."""
        self.fixed.fill(rows, self.runner)
        self.model.forward(self.fixed.inputs)  # as before every capture, so that caches are full
        with capture() as graph:
            logits = self.model.forward(self.fixed.inputs)
        return graph, logits


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_mixed_step_reads_nothing_back(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill chunks beside decodes: what is captured of their steps has nothing that waits."""
    forward, launches = AdaptedModel.forward, []

    def captured(model: AdaptedModel, inputs: StepInputs) -> torch.Tensor:
        forward(model, inputs)
        with capture() as graph:
            logits = forward(model, inputs)
        assert inputs.attention.chunks is not None and inputs.attention.decodes is not None
        launches.append((inputs.attention.decodes, inputs.attention.chunks, set(graph.launches)))
        return logits.clone()

    monkeypatch.setattr(AdaptedModel, "forward", captured)
    streams = [Stream("all", list(range(3, 9))), Stream("few", list(range(3, 12)), starts_at=1)]
    house.runner.run(streams, chunk=8, new_tokens=2)
    assert any(decodes and chunks for decodes, chunks, _ in launches)
    assert all(found >= DECODE - {"_combine"} for _, _, found in launches)


def test_a_decode_is_replayed_for_other_sequences(house: House) -> None:
    few, everything, base = house.streams
    graph, logits = house.captured([few, None, everything, base])
    assert set(graph.launches) == DECODE
    assert not [name for name in graph.operations if name.startswith("manylora")]
    steps: list[list[Stream | None]] = [
        [few, None, everything, base],
        [base, few, None, everything],
        [None, base, None, None],
        [everything, base, few, None],
    ]
    for rows in steps:
        house.fixed.fill(rows, house.runner)
        graph.replay()
        replayed = logits.clone()
        live = [stream for stream in rows if stream is not None]
        ends = [stream.done for stream in live]
        house.runner.decode(live)
        for stream, end in zip(live, ends, strict=True):
            torch.testing.assert_close(replayed[rows.index(stream)], stream.rows[end])
    for stream in house.streams:
        wanted = house.oracle.greedy(stream.adapter, stream.prompt, len(stream.generated))
        assert stream.generated == wanted
    check_that_the_table_is_read(house, graph, logits)


def check_that_the_table_is_read(house: House, graph: Graph, logits: torch.Tensor) -> None:
    """Adapters that trade slots between two replays, as loads and evictions do."""
    few, everything, base = house.streams
    rows = [few, everything, None, base]
    house.fixed.fill(rows, house.runner)
    graph.replay()
    before = logits.clone()
    table, slots = house.model.step.table, house.runner.slots
    entries = {
        name: [part[slot].clone().numpy() for part in (table.rank, table.scale, table.offsets)]
        for name, slot in slots.items()
    }
    slots["few"], slots["all"] = slots["all"], slots["few"]
    for name, slot in slots.items():
        table.write(slot, *entries[name])
    graph.replay()
    assert not torch.equal(logits[:2], before[:2]), "the table was not read"
    house.fixed.fill(rows, house.runner)
    graph.replay()
    assert torch.equal(logits[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 1),
        lambda x: float(x[0]),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0]),
    ],
)
def test_a_capture_refuses_what_a_graph_cannot_have(read: object) -> None:
    assert callable(read)
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=r"the host|device"), torch.inference_mode(), capture():
        read(x)
