"""`manylora check`: the comparison with peft that users can make for themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing.adapters import tiny_lora
from manylora_testing.classifiers import make_task_adapter, tiny_encoder
from manylora_testing.methods import make_method
from manylora_testing.models import tiny_model
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.errors import FailedPrecondition, InvalidArgument, MissingExtra
from manylora.server.cli import main
from manylora.server.engine.tokenizer import Tokenizer
from manylora.server.offline import check as module
from manylora.server.offline.check import compare

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = "the printer is on fire"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("check") / "base"
    return tiny_tokenizer(tiny_model("llama", directory, vocab_size=TOKENIZER_VOCAB))


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("method", ["dora", "prompt", "prefix", "multitask", "lora-head-saved"])
def test_served_is_pefts(method: str, base: Path, model: Any, tmp_path: Path) -> None:
    found = compare(base, make_method(method, "llama", model, tmp_path / method), PROMPT)
    assert found.holds and found.difference < 1e-4
    assert found.effect is not None and found.effect > 0.1 and found.size > 1
    assert found.tokens > 3


def test_from_the_invocation_on(base: Path, tmp_path: Path) -> None:
    ids = Tokenizer(base).encode(PROMPT).ids
    adapter = tiny_lora(
        base,
        tmp_path / "alora",
        r=4,
        alpha=8,
        targets=["q_proj", "down_proj", "lm_head"],
        seed=1,
        alora_invocation_tokens=ids[3:5],
    )
    found = compare(base, adapter, PROMPT)
    assert found.holds and found.effect is not None and found.effect > 0.1
    other = compare(base, adapter, PROMPT[:4])
    assert other.holds and other.effect == 0


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_other_tasks(arch: str, task: str, base: Path, tmp_path: Path) -> None:
    if arch == "bert":
        base, targets = tiny_tokenizer(tiny_encoder(arch, tmp_path / "base")), ["query", "value"]
    else:
        targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    found = compare(base, make_task_adapter(base, tmp_path / "adapter", task, config), PROMPT)
    assert (found.task, found.holds) == (task, True)
    assert found.difference < 1e-4
    if (arch, task) == ("bert", "FEATURE_EXTRACTION"):  # what an encoder's adapter without one has
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None}))
        assert compare(base, tmp_path / "adapter", PROMPT) == found


def test_bfloat16_has_its_own_tolerance(base: Path, model: Any, tmp_path: Path) -> None:
    adapter = make_method("lora", "llama", model, tmp_path / "lora")
    found = compare(base, adapter, PROMPT, dtype="bfloat16")
    assert found.holds and found.difference > 1e-4
    assert not compare(base, adapter, PROMPT, dtype="bfloat16", tolerance=1e-6).holds


@pytest.mark.parametrize("how", ["text", "json"])
def test_exit_status_tells(
    how: str,
    base: Path,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong answer is seen: peft is given another adapter than we are."""
    adapter = make_method("lora", "llama", model, tmp_path / "lora")
    command = ["manylora", "check", str(adapter), "--base", str(base), "--prompt", PROMPT]
    monkeypatch.setattr(sys, "argv", [*command, "--json"] if how == "json" else command)

    def run() -> int:
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0)

    def load_other(base: Path, checkpoint: Any, dtype: torch.dtype) -> Any:
        tensors = load_file(adapter / WEIGHTS)
        save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)
        return load(base, checkpoint, dtype)

    assert run() == 0
    out = capsys.readouterr().out
    assert json.loads(out)["holds"] if how == "json" else out.endswith(": as peft\n")
    load = module.load_peft
    monkeypatch.setattr(module, "load_peft", load_other)
    assert run() == 1
    out = capsys.readouterr().out
    assert not json.loads(out)["holds"] if how == "json" else "NOT as peft" in out


def test_what_is_refused(base: Path, model: Any, tmp_path: Path) -> None:
    adapter = make_method("lora", "llama", model, tmp_path / "lora")
    with pytest.raises(InvalidArgument, match="does not fit the context"):
        compare(base, adapter, PROMPT * 200)
    with pytest.raises(InvalidArgument, match="no such dtype"):
        compare(base, adapter, PROMPT, dtype="float8")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "ROAD"}))
    with pytest.raises(FailedPrecondition, match="not served"):
        compare(base, adapter, PROMPT)


def test_a_missing_package_is_named(
    base: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_method("lora", "llama", model, tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"manylora\[train\]"):
        compare(base, adapter, PROMPT)
