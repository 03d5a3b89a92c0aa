"""All layers in one call give what each layer by itself gives, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from manylora_testing import FlatRunner, Oracle, Stream, tiny_lora, tiny_model
from manylora_testing.matrix import column_runner, column_streams, make_column
from manylora_testing.models import PACKED

from manylora import kernels
from manylora.kernels import cpu
from manylora.server.engine.model import AdaptedModel, load_model
from manylora.server.engine.model.fuse import FusedLayer
from manylora.server.engine.model.stack import DecoderStack

CPU = torch.device("cpu")
FUSED = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3"]
ISAS = cpu.isas() if cpu.available() else ()

pytestmark = pytest.mark.skipif(not ISAS, reason=cpu.why_unavailable())


def fused_layers(model: AdaptedModel) -> list[FusedLayer]:
    return [layer for layer in model.model.modules() if isinstance(layer, FusedLayer)]


def run(model: AdaptedModel, adapters: dict[str, Path]) -> list[Stream]:
    runner = FlatRunner(model, adapters, kernels.select(CPU))
    generator = torch.Generator().manual_seed(0)
    streams = [
        Stream(name, torch.randint(3, 96, (length,), generator=generator).tolist(), watched=True)
        for name in (None, *adapters)
        for length in (5, 41)
    ]
    runner.run(streams, chunk=24, new_tokens=6)
    return streams


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("arch", FUSED)
def test_stack_equals_layers(arch: str, isa: str, tmp_path: Path) -> None:
    sizes = {**PACKED, "head_dim": 16} if arch == "mistral" else PACKED
    base = tiny_model(arch, tmp_path / "base", **sizes)
    target = "gate_up_proj" if arch == "phi3" else "gate_proj"
    adapters = {
        f"r{r}": tiny_lora(
            base, tmp_path / f"r{r}", r=r, alpha=2 * r, targets=[target, "o_proj"], seed=r
        )
        for r in (3, 8)
    }
    before = cpu.current_isa()
    cpu.set_isa(isa)
    try:
        model = load_model(base, "bfloat16", CPU, kernels.select(CPU))
        layers = fused_layers(model)
        stack = layers[0].stack
        assert stack is not None
        torch.set_num_threads(2)
        whole = run(model, adapters)
        torch.set_num_threads(1)
        assert stack.active
        for layer in layers:
            layer.stack = None
        single = run(model, adapters)
    finally:
        cpu.set_isa(before)
    truth = Oracle(base, adapters)
    for a, b in zip(whole, single, strict=True):
        assert a.tokens == b.tokens
        for position in a.rows:
            assert torch.equal(a.rows[position], b.rows[position])
        wanted = truth.logits(a.adapter, a.tokens[:-1])
        got = torch.stack([a.rows[p] for p in sorted(a.rows)])
        assert float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) < 0.05


@pytest.mark.filterwarnings("ignore")
def test_methods_by_the_stack_are_those_by_layers(tmp_path: Path) -> None:
    """All methods that change nothing for which the stack has no place, to the same bits."""
    column = make_column("llama", tmp_path, torch.bfloat16, **PACKED)
    backend = kernels.select(CPU)
    model = load_model(column.path, "bfloat16", CPU, backend)
    layers = fused_layers(model)
    stack = layers[0].stack
    assert stack is not None
    runner = column_runner(column, model, backend)
    layered = column_streams(column)
    for layer in layers:
        layer.stack = None
    runner.run(layered, chunk=4, new_tokens=1)

    whole = [
        stream for stream in column_streams(column) if runs_whole(model, stack, runner, stream)
    ]
    left = {stream.adapter for stream in layered} - {stream.adapter for stream in whole}
    assert left == {"ia3", "ia3-odd", "ia3-all-saved", "ln-tuning", "lora-norms-saved"}
    for stream in layered:
        runner.give_back(stream)
    for layer in layers:
        layer.stack = stack
    runner.run(whole, chunk=4, new_tokens=1)
    assert stack.active
    by_method = {stream.adapter: stream for stream in layered}
    for stream in whole:
        other = by_method[stream.adapter]
        assert all(torch.equal(stream.rows[p], other.rows[p]) for p in stream.rows), stream.adapter


def runs_whole(
    model: AdaptedModel, stack: DecoderStack, runner: FlatRunner, stream: Stream
) -> bool:
    """Whether a step of nothing but the stream's rows would."""
    step = model.step
    step.plan = kernels.make_plan(np.array([runner.slots.get(stream.adapter or "", -1)], np.int32))
    step.overridden = step.overrides.of(step.plan)
    return stack.begin()
