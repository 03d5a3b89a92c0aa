"""Mixed batches against transformers + peft, one sequence at a time: float32, within 1e-4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manylora_testing import (
    ARCHITECTURES,
    FlatRunner,
    Oracle,
    Stream,
    tiny_lora,
    tiny_model,
)

from manylora import kernels
from manylora.adapters_store.edits import ModuleKind
from manylora.kernels import cpu
from manylora.server.engine.model import AdaptedModel, load_model

TOLERANCE = 1e-4
REFUSED = {"gptj"}
ON_CPU_KERNELS = ("llama", "gemma2", "bloom", "gpt2", "phi3", "gpt_oss")
FUSED = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "phi3-longrope"),
    *("gemma", "gemma2", "gemma3"),
)
CASES = [("reference", arch, False) for arch in ARCHITECTURES if arch not in REFUSED]
CASES += [("cpu", arch, False) for arch in ON_CPU_KERNELS]
CASES += [(backend, arch, True) for arch in FUSED for backend in ("reference", "cpu")]
CPU = torch.device("cpu")


def make_adapters(model: AdaptedModel, base: Path, where: Path) -> dict[str, Path]:
    """Three adapters of different rank, alpha, scaling and targets, made by peft."""
    linear = (ModuleKind.LINEAR, ModuleKind.CONV1D)
    inner = [n for n, shape in model.modules.items() if shape.kind in linear and n != "lm_head"]
    leaves = list(dict.fromkeys(name.split(".")[-1] for name in inner))
    # all-linear would take experts too, which are not served
    wide = leaves if hasattr(model.config, "num_experts_per_tok") else "all-linear"
    return {
        "two": tiny_lora(base, where / "two", r=2, alpha=9, targets=leaves[:2], seed=1),
        "all": tiny_lora(base, where / "all", r=5, alpha=4, targets=wide, seed=2),
        "head": tiny_lora(
            base,
            where / "head",
            r=16,
            alpha=6,
            targets=[leaves[-1], "lm_head"],
            seed=3,
            use_rslora=True,
        ),
    }


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (length,), generator=generator).tolist()


def make_streams() -> list[Stream]:
    """Shorter and longer than a block (16) and a chunk (11), joining at different steps."""
    return [
        Stream(None, prompt(3, 1), watched=True),
        Stream("two", prompt(37, 2), watched=True),
        Stream("all", prompt(16, 3)),
        Stream("head", prompt(5, 4), watched=True, starts_at=1),
        Stream(None, prompt(40, 5), starts_at=2),
        Stream("all", prompt(23, 6), watched=True, starts_at=2),
        Stream("two", prompt(1, 7), starts_at=3),
        Stream("head", prompt(33, 8), starts_at=4),
    ]


def differences(streams: list[Stream], oracle: Oracle) -> dict[str, float]:
    """Largest difference of logits by adapter; checks that the text is the oracle's greedy one."""
    worst: dict[str, float] = {}
    for stream in streams:
        wanted = oracle.logits(stream.adapter, stream.tokens[:-1])
        positions = sorted(stream.rows)
        assert positions[-1] == len(stream.tokens) - 2
        assert len(positions) == (len(wanted) if stream.watched else len(stream.generated))
        found = torch.stack([stream.rows[p] for p in positions])
        # each token the argmax of the oracle's logits after the tokens before it: its greedy text
        assert stream.generated == wanted[len(stream.prompt) - 1 :].argmax(dim=1).tolist()
        difference = float((found - wanted[positions]).abs().max())
        name = stream.adapter or "base"
        worst[name] = max(worst.get(name, 0.0), difference)
    return worst


@pytest.mark.parametrize(("backend", "arch", "fused"), CASES)
def test_mixed_batch_equals_peft(backend: str, arch: str, fused: bool, tmp_path: Path) -> None:
    if backend == "cpu" and not cpu.available():
        pytest.skip(cpu.why_unavailable())
    chosen = kernels.select(CPU, backend)
    base = tiny_model(arch, tmp_path / "base")
    model = load_model(base, "float32", CPU, chosen, fused=fused)
    assert bool(model.packed) == fused
    adapters = make_adapters(model, base, tmp_path)
    runner = FlatRunner(model, adapters, chosen)
    streams = make_streams()
    runner.run(streams, chunk=11, new_tokens=6)
    oracle = Oracle(base, adapters)
    worst = differences(streams, oracle)
    assert set(worst) == {"base", "two", "all", "head"}
    assert max(worst.values()) < TOLERANCE, worst
    # the comparison has teeth: adapters differ from the base and each other by far more
    ids = streams[1].tokens
    answers = [oracle.logits(name, ids) for name in (None, *adapters)]
    gaps = [float((a - b).abs().max()) for i, a in enumerate(answers) for b in answers[:i]]
    assert min(gaps) > 500 * TOLERANCE, gaps
