"""Walks through peft's tutorial "PEFT configurations and models", to the end: served.

The bases have the shapes of the tutorial's, narrower and with random weights: facebook/opt-350m,
whose embeddings are narrower than its layers and whose norms come after them, and roberta-large.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing.classifiers import peft_answer, task_model, tiny_encoder
from manylora_testing.models import tiny_model
from manylora_testing.oracle import Oracle
from manylora_testing.served import Served, served
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.client import Client
from manylora.server.cli import main
from manylora.server.engine.settings import EngineSettings

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
STEPS = 10
ANSWERS = {"hot": "the printer is on fire", "wrong": "der Drucker brennt", "third": "café, 東京"}
PROMPT = "the invoice of the last month"
LORA: dict[str, Any] = {
    "base_model_name_or_path": "facebook/opt-350m",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 16,
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
"""The tutorial's first configuration, as an early peft wrote it."""

P_TUNING: dict[str, Any] = {
    "base_model_name_or_path": "roberta-large",
    "encoder_dropout": 0.0,
    "encoder_hidden_size": 128,
    "encoder_num_layers": 2,
    "encoder_reparameterization_type": "MLP",
    "inference_mode": True,
    "num_attention_heads": 16,
    "num_layers": 24,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": 20,
    "peft_type": "P_TUNING",
    "task_type": "SEQ_CLS",
    "token_dim": 1024,
}
"""Its second."""


@pytest.fixture
def manylora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `manylora ARGUMENTS`; what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["manylora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def train(model: Any, inputs: dict[str, torch.Tensor], seed: int, rate: float) -> None:
    """A few steps; the loss falls."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    torch.manual_seed(seed)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base of opt-350m's shape, and adapters trained to answer differently."""
    root = tmp_path_factory.mktemp("opt")
    base = tiny_tokenizer(tiny_model("opt-350m", root / "opt-350m", vocab_size=TOKENIZER_VOCAB))
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapters = {}
    for seed, (name, answer) in enumerate(ANSWERS.items()):
        config = peft.LoraConfig(
            r=16,
            target_modules=["q_proj", "v_proj"],
            task_type=peft.TaskType.CAUSAL_LM,
            lora_alpha=32,
            lora_dropout=0.05,
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        ids = tokenizer(f"{PROMPT}{answer}", return_tensors="pt")["input_ids"]
        train(model, {"input_ids": ids, "labels": ids}, seed, rate=0.02)
        model.save_pretrained(root / name)
        adapters[name] = root / name
    return base, adapters


@pytest.fixture(scope="module")
def opt_server(
    opt: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    settings = EngineSettings(model=opt[0], kv_cache_bytes=4 << 20, adapter_bytes=1 << 20)
    with served(settings, tmp_path_factory.mktemp("store")) as server:
        yield server


def with_config(saved: Path, directory: Path, config: dict[str, Any]) -> Path:
    """The adapter's tensors under another configuration."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    weights = "adapter_model.safetensors"
    (directory / weights).write_bytes((saved / weights).read_bytes())
    return directory


def test_lora(
    opt: tuple[Path, dict[str, Path]],
    opt_server: Served,
    tmp_path: Path,
    manylora: Callable[..., str],
) -> None:
    """Trained, saved, published, served; further adapters added and switched to and fro, one of
    them under the tutorial's own configuration."""
    base, trained = opt
    adapters = {**trained, "tutorial": with_config(trained["hot"], tmp_path / "tutorial", LORA)}
    oracle = Oracle(base, adapters)
    with Client(opt_server.target) as client:
        ids = client.tokenize(PROMPT)
        right = {name: oracle.greedy(name, ids, STEPS) for name in adapters}
        right[""] = oracle.greedy(None, ids, STEPS)
        assert len({tuple(tokens) for tokens in right.values()}) == len(trained) + 1
        assert right["tutorial"] == right["hot"]

        def check(name: str) -> None:
            adapter = f"acme/{name}" if name else ""
            found = client.generate(
                PROMPT, adapter=adapter, max_tokens=STEPS, ignore_eos=True, logprobs=0
            )
            assert list(found.token_ids) == right[name], name
            logits = oracle.logits(name or None, ids)[-1]
            first = float(logits.log_softmax(0)[found.token_ids[0]])
            assert abs(found.logprobs[0].chosen.logprob - first) < TOLERANCE
            answer = manylora(
                "generate", PROMPT, "--adapter", adapter, "--max-tokens", STEPS, "--ignore-eos",
                "--json", "--server", opt_server.target,
            )  # fmt: skip
            assert json.loads(answer)["token_ids"] == right[name]

        check("")
        for name, directory in adapters.items():
            published = manylora(
                "adapters", "publish", f"acme/{name}", directory, "--server", opt_server.target
            )
            assert published == f"acme/{name}@1\n"
            check(name)
        for name in ("hot", "third", "", "hot", "wrong"):
            check(name)
        # a second version under the name, while the first stays to be had
        client.publish("acme/hot", adapters["wrong"], aliases=["canary"])
        newest = client.generate(PROMPT, adapter="acme/hot", max_tokens=STEPS, ignore_eos=True)
        first = client.generate(PROMPT, adapter="acme/hot@1", max_tokens=STEPS, ignore_eos=True)
        assert list(newest.token_ids) == right["wrong"]
        assert list(first.token_ids) == right["hot"]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base as wide as roberta-large, and a trained classifier behind virtual tokens."""
    root = tmp_path_factory.mktemp("roberta")
    base = tiny_encoder(
        "roberta",
        root / "roberta-large",
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        max_position_embeddings=514,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=2,
    )
    tiny_tokenizer(base)
    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(
        encoder_reparameterization_type="MLP",
        encoder_hidden_size=128,
        num_attention_heads=16,
        num_layers=24,
        num_transformer_submodules=1,
        num_virtual_tokens=20,
        token_dim=1024,
        task_type=peft.TaskType.SEQ_CLS,
    )
    model = peft.get_peft_model(task_model(base, "SEQ_CLS", 2), config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = dict(tokenizer(list(ANSWERS.values()), padding=True, return_tensors="pt"))
    train(model, {**inputs, "labels": torch.tensor([1, 0, 1])}, 0, rate=1e-3)
    model.save_pretrained(root / "p-tuning")
    return base, root / "p-tuning"


def test_p_tuning(roberta: tuple[Path, Path], tmp_path: Path, manylora: Callable[..., str]) -> None:
    """With the configuration of today, and with the tutorial's own."""
    base, saved = roberta
    adapters = [saved, with_config(saved, tmp_path / "tutorial", P_TUNING)]
    settings = EngineSettings(model=base, kv_cache_bytes=0, adapter_bytes=32 << 20)
    with served(settings, tmp_path / "store") as server, Client(server.target) as client:
        for i, adapter in enumerate(adapters, 1):
            published = manylora(
                "adapters", "publish", "acme/paraphrase", adapter, "--server", server.target
            )
            assert published == f"acme/paraphrase@{i}\n"
        for text in ANSWERS.values():
            for i, adapter in enumerate(adapters, 1):
                found = client.classify(text, adapter=f"acme/paraphrase@{i}")
                right = peft_answer(base, adapter, "SEQ_CLS", client.tokenize(text))
                assert found.logits == pytest.approx(right.tolist(), abs=TOLERANCE)
                assert found.scores == pytest.approx(right.softmax(0).tolist(), abs=TOLERANCE)
                assert found.label == f"LABEL_{int(right.argmax())}"
