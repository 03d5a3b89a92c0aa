"""All layers in one call give what each layer by itself gives, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manylora_testing import FlatRunner, Oracle, Stream, tiny_lora, tiny_model

from manylora import kernels
from manylora.kernels import cpu
from manylora.server.engine.model import AdaptedModel, load_model
from manylora.server.engine.model.fuse import FusedLayer

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 96}
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
    sizes = {**WIDE, "head_dim": 16} if arch == "mistral" else WIDE
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
        whole = run(model, adapters)
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


def test_replaced_parameters_run_layer_by_layer(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base", **WIDE)
    model = load_model(base, "bfloat16", CPU, kernels.select(CPU))
    stack = fused_layers(model)[0].stack
    assert stack is not None
    model.step.table = kernels.EditTable(1, len(model.modules))
    model.step.table.in_scaled[0, 0] = True
    model.step.plan = kernels.make_plan(torch.tensor([0], dtype=torch.int32).numpy())
    assert not stack.begin()
    model.step.plan = kernels.make_plan(torch.tensor([-1], dtype=torch.int32).numpy())
    assert stack.begin()
