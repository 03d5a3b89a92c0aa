"""What peft 0.2 to 0.21 wrote is published and served as today's peft loads it.

Each release added keys to its configurations; an old file lacks them. Weights' names have changed
too, by who saved them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing.adapters import tiny_lora
from manylora_testing.classifiers import make_task_adapter, peft_answer, tiny_encoder
from manylora_testing.methods import make_method
from manylora_testing.models import tiny_model
from manylora_testing.oracle import Oracle
from manylora_testing.served import served
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.client import Client
from manylora.server.engine.settings import EngineSettings

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
STEPS = 6
WEIGHTS = "adapter_model.safetensors"
RELEASES: Mapping[str, Mapping[str, Any]] = {
    "0.2": {
        "base_model_name_or_path": "facebook/opt-350m",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 16,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    },
    "0.3": {"init_lora_weights": True},
    "0.4": {
        "auto_mapping": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "revision": None,
    },
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.16": {"qalora_group_size": 16, "use_qalora": False},
    "0.17": {"target_parameters": None},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.0",
    },
}
"""Release → the keys that it has beside the ones before it, of LoRA; the first two of these left
with 0.3."""

LEFT = {"enable_lora": "0.3", "merge_weights": "0.3"}
_COMMON = "base_model_name_or_path inference_mode peft_type task_type"
_PROMPT = (
    f"{_COMMON} num_attention_heads num_layers num_transformer_submodules num_virtual_tokens "
    "token_dim"
)
_LYCORIS = (
    f"{_COMMON} alpha alpha_pattern auto_mapping init_weights layers_pattern layers_to_transform "
    "module_dropout modules_to_save r rank_dropout rank_pattern revision target_modules "
    "use_effective_conv2d"
)
FIRST: Mapping[str, str] = {
    "adalora": f"{_COMMON} beta1 beta2 bias deltaT fan_in_fan_out init_lora_weights init_r "
    "lora_alpha lora_dropout modules_to_save orth_reg_weight r rank_pattern target_modules "
    "target_r tfinal tinit total_step",
    "ia3": f"{_COMMON} fan_in_fan_out feedforward_modules init_ia3_weights modules_to_save "
    "target_modules",
    "loha": _LYCORIS,
    "lokr": f"{_LYCORIS} decompose_both decompose_factor",
    "prompt": f"{_PROMPT} prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path",
    "p-tuning": f"{_PROMPT} encoder_dropout encoder_hidden_size encoder_num_layers "
    "encoder_reparameterization_type",
    "prefix": f"{_PROMPT} encoder_hidden_size prefix_projection",
}
"""Method → the keys that its configuration had in the release that brought it."""

NAMES: Mapping[str, Callable[[str], str]] = {
    "as today": lambda name: name,
    "without a prefix": lambda name: name.removeprefix("base_model.model."),
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
}


def config_of(release: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for each, added in RELEASES.items():
        keys.update(added)
        for key in [key for key, end in LEFT.items() if end == each]:
            keys.pop(key, None)
        if each == release:
            return keys
    raise KeyError(release)


def changed(
    saved: Path,
    directory: Path,
    config: Mapping[str, Any],
    name: Callable[[str], str] = lambda name: name,
) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(saved / WEIGHTS)
    save_file({name(old): tensor for old, tensor in tensors.items()}, directory / WEIGHTS)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "opt"
    return tiny_tokenizer(tiny_model("opt", directory, vocab_size=TOKENIZER_VOCAB))


@pytest.fixture(scope="module")
def client(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    settings = EngineSettings(model=base, kv_cache_bytes=4 << 20, adapter_bytes=4 << 20)
    store = tmp_path_factory.mktemp("store")
    with served(settings, store) as server, Client(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    return tiny_lora(base, directory, r=16, alpha=32, targets=["q_proj", "v_proj"], seed=3)


def check(client: Client, base: Path, adapter: Path, reference: str, right_of: Path) -> None:
    """What is served for `adapter` is what peft makes of `right_of`."""
    client.publish(reference, adapter)
    ids = client.tokenize("the printer in the hall")
    found = client.generate(
        token_ids=ids, adapter=reference, max_tokens=STEPS, ignore_eos=True, logprobs=1
    )
    oracle = Oracle(base, {"adapter": right_of})
    assert list(found.token_ids) == oracle.greedy("adapter", ids, STEPS)
    tokens = [*ids, *found.token_ids]
    plain = Oracle(base, {}).logits(None, tokens)
    logits = oracle.logits("adapter", tokens)[-len(tokens) :]  # behind virtual tokens
    assert float((logits - plain).abs().max()) > 100 * TOLERANCE
    for entry, row in zip(found.logprobs, logits[len(ids) - 1 : -1], strict=True):
        right = float(row.log_softmax(dim=0)[entry.chosen.token_id])
        assert entry.chosen.logprob == pytest.approx(right, abs=TOLERANCE)


@pytest.mark.parametrize("release", RELEASES)
def test_lora_of_each_release(
    release: str, client: Client, base: Path, lora: Path, tmp_path: Path
) -> None:
    adapter = changed(lora, tmp_path / "old", config_of(release))
    check(client, base, adapter, f"old/{release}", right_of=adapter)


@pytest.mark.parametrize("names", NAMES)
def test_names_of_tensors(
    names: str, client: Client, base: Path, lora: Path, tmp_path: Path
) -> None:
    dash = str.maketrans(" '", "--")
    adapter = changed(lora, tmp_path / "named", config_of("0.3"), NAMES[names])
    check(client, base, adapter, f"named/{names.translate(dash)}", right_of=lora)


@pytest.mark.parametrize("method", FIRST)
def test_methods_of_their_first_release(
    method: str, client: Client, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    saved = make_method(method, "opt", model, tmp_path / "saved")
    keys = json.loads((saved / "adapter_config.json").read_text())
    adapter = changed(saved, tmp_path / "old", {key: keys[key] for key in FIRST[method].split()})
    check(client, base, adapter, f"first/{method}", right_of=adapter)


def test_prefixes_of_a_classifier(tmp_path: Path) -> None:
    """As peft's first documentation has it for SEQ_CLS on BERT."""
    base = tiny_tokenizer(tiny_encoder("bert", tmp_path / "bert"))
    config = peft.PrefixTuningConfig(num_virtual_tokens=20, encoder_hidden_size=48)
    saved = make_task_adapter(base, tmp_path / "saved", "SEQ_CLS", config)
    keys = json.loads((saved / "adapter_config.json").read_text())
    old = {key: keys[key] for key in FIRST["prefix"].split()}
    adapter = changed(saved, tmp_path / "old", old)
    settings = EngineSettings(model=base, kv_cache_bytes=0, adapter_bytes=1 << 20)
    with served(settings, tmp_path / "store") as server, Client(server.target) as client:
        client.publish("old/prefix", adapter)
        found = client.classify("the printer in the hall", adapter="old/prefix")
        ids = client.tokenize("the printer in the hall")
    right = peft_answer(base, adapter, "SEQ_CLS", ids)
    assert found.logits == pytest.approx(right.tolist(), abs=TOLERANCE)
