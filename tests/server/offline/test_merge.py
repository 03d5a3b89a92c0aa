"""`manylora merge`: what is written serves as the adapter on its base does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing.classifiers import make_task_adapter, peft_answer, task_model, tiny_encoder
from manylora_testing.engine import House
from manylora_testing.methods import make_method
from manylora_testing.models import tiny_model
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from transformers import AutoModelForCausalLM

from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.server.cli import main
from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import PooledTask
from manylora.server.offline.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = [9, 8, 7, 70]
Make = Callable[[str], tuple[Path, Path]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Directories of a base and of an adapter for it, both fresh."""

    def build(method: str, arch: str = "llama") -> tuple[Path, Path]:
        directory = tiny_model(arch, tmp_path / "base", vocab_size=TOKENIZER_VOCAB)
        base = tiny_tokenizer(directory)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return base, make_method(method, arch, model, tmp_path / "adapter")

    return build


async def served(base: Path, adapters: dict[str, Path], task: PooledTask | None = None) -> Any:
    """Tokens and their likeliest, or classes, of a prompt on the one adapter or the bare base."""
    settings = EngineSettings(model=base, kv_cache_bytes=1 << 20, adapter_bytes=1 << 20)
    house = House(settings, adapters)
    await house.engine.start()
    try:
        name = next(iter(adapters), "")
        if task is not None:
            return (await house.pool(PROMPT, name, task)).values
        answer = await house.ask(PROMPT, name, max_tokens=8, ignore_eos=True, logprobs=5)
        return answer.tokens, [e.logprob for row in answer.logprobs for e in row.top]
    finally:
        await house.stop()


@pytest.mark.parametrize(
    ("method", "arch"),
    [("dora", "llama"), ("loha", "llama"), ("lora-embedding", "qwen3"), ("lora-tokens", "qwen3")],
)
async def test_served_alike(method: str, arch: str, make: Make, tmp_path: Path) -> None:
    """Also where the head is the embedding, and only one of them has an edit."""
    base, adapter = make(method, arch)
    out = merge(base, adapter, tmp_path / "new" / "merged")
    tokens, values = await served(base, {"adapter": adapter})
    merged_tokens, merged_values = await served(out, {})
    assert tokens == merged_tokens
    assert merged_values == pytest.approx(values, abs=1e-4)
    assert values != pytest.approx((await served(base, {}))[1], abs=1e-2)
    assert [p.name for p in out.parent.iterdir()] == ["merged"]  # nothing beside it


async def test_what_is_not_served_as_an_adapter(make: Make, tmp_path: Path) -> None:
    base, _ = make("lora")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "oft_R" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "oft")
    out = merge(base, tmp_path / "oft", tmp_path / "merged")
    tokens, _ = await served(out, {})
    with torch.inference_mode():
        rows = wrapped.eval()(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1]
    assert tokens == rows.argmax(dim=-1).tolist()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
async def test_classifiers(task: str, tmp_path: Path) -> None:
    """With the labels that the adapter's config names."""
    base = tiny_tokenizer(tiny_encoder("bert", tmp_path / "base"))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"])
    adapter = make_task_adapter(base, tmp_path / "adapter", task, config)
    right = peft_answer(base, adapter, task, PROMPT)
    path = adapter / "adapter_config.json"
    named = json.loads(path.read_text()) | {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}
    path.write_text(json.dumps(named))
    out = merge(base, adapter, tmp_path / "merged")
    assert task_model(out, task).config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    pooled = PooledTask.CLASSIFY if task == "SEQ_CLS" else PooledTask.CLASSIFY_TOKENS
    values = torch.from_numpy(await served(out, {}, pooled))
    torch.testing.assert_close(values, right.reshape(values.shape), rtol=0, atol=1e-4)


def test_dtype_is_the_bases_or_as_told(make: Make, tmp_path: Path) -> None:
    base, adapter = make("lora")
    own: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    own.save_pretrained(tmp_path / "halves")
    for dtype, wanted in (("auto", torch.bfloat16), ("float32", torch.float32)):
        out = merge(tmp_path / "halves", adapter, tmp_path / dtype, dtype=dtype)
        assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == wanted


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora_bias"])
def test_what_has_no_place_in_weights_is_refused(method: str, make: Make, tmp_path: Path) -> None:
    base, adapter = make(method)
    with pytest.raises(FailedPrecondition, match="cannot merge") as caught:
        merge(base, adapter, tmp_path / "out" / "merged")
    assert caught.value.field == "adapter"
    assert not (tmp_path / "out").exists()


def test_a_merge_that_is_not_the_adapter_is_not_kept(make: Make, tmp_path: Path) -> None:
    """peft merges both sets of rows into the one weight that head and embedding share."""
    base, adapter = make("lora-tokens-of-each", "qwen3")
    with pytest.raises(FailedPrecondition, match="computes something else"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_from_the_command_line(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = make("lora")
    out = tmp_path / "merged"
    command = ["manylora", "merge", str(adapter), "--base", str(base), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    for code in (0, 2):  # the second time it is taken
        with pytest.raises(SystemExit) as caught:
            main()
        assert int(caught.value.code or 0) == code
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n" and "taken" in shown.err
    assert {p.name for p in out.iterdir()} > {"config.json", "model.safetensors", "tokenizer.json"}
    with pytest.raises(InvalidArgument):
        merge(base, adapter, base)
