"""`ensure_weight_tying` against peft's own forward; what does not go together is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from manylora_testing.flat import FlatRunner, Stream
from manylora_testing.methods import peft_rows, shake
from manylora_testing.models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manylora.adapters_store.format import read_checkpoint
from manylora.errors import FailedPrecondition, ManyloraError
from manylora.kernels import reference
from manylora.server.engine.model import load_model

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = [4, 50, 61, 7, 88]
CASES: Mapping[str, Mapping[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "pattern": {"target_modules": r".*(q_proj|embed_tokens)"},
    "rank-stabilised": {"target_modules": ["embed_tokens"], "use_rslora": True, "lora_alpha": 3},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 7]},
    "neither": {"target_modules": ["q_proj"]},
}


def read(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is tied."""
    return tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(**options: Any) -> Path:
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", ensure_weight_tying=True, **options)
        torch.manual_seed(0)
        model = peft.get_peft_model(read(base), config)
        shake(model, 3)
        model.save_pretrained(tmp_path / "made")
        return tmp_path / "made"

    return make


def serve(base: Path, adapter: Path, fused: bool) -> torch.Tensor:
    model = load_model(base, "float32", torch.device("cpu"), reference, fused=fused)
    runner = FlatRunner(model, {"adapter": adapter}, reference)
    stream = Stream("adapter", PROMPT, watched=True)
    runner.run([stream], chunk=3, new_tokens=1)
    return torch.stack([stream.rows[i] for i in range(len(PROMPT))])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_as_peft(case: str, fused: bool, base: Path, make: Callable[..., Path]) -> None:
    adapter = make(**CASES[case])
    right, plain = (peft_rows(read(base), path, PROMPT) for path in (adapter, None))
    assert float((serve(base, adapter, fused) - right).abs().max()) < 1e-4
    assert float((plain - right).abs().max()) > 0.01


def lower(base: Path, adapter: Path) -> None:
    model = load_model(base, "float32", torch.device("cpu"), reference, fused=False)
    model.lower(read_checkpoint(adapter))


def test_a_head_with_tensors_of_its_own(base: Path, make: Callable[..., Path]) -> None:
    adapter = make(**CASES["embedding"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_B.weight"] *= 2
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(
        FailedPrecondition, match=r"lm_head\.lora_B\.weight: not what the adapter has"
    ):
        lower(base, adapter)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_of_a_tied_head(init: Any, base: Path, tmp_path: Path) -> None:
    """It changes the embedding with the head; a file without the base's copies does not show it."""
    config = peft.LoraConfig(
        r=2, target_modules=["lm_head"], init_lora_weights=init, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(read(base), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(FailedPrecondition, match=r"lm_head: .*tied"):
        lower(base, tmp_path)


@pytest.mark.parametrize("case", ["embedding", "saved embedding"])
def test_a_base_whose_head_is_not_tied(
    case: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_model("qwen3", tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(FailedPrecondition):
        lower(other, make(**CASES[case]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("alpha_pattern", {"q_proj": 3}), ("rank_pattern", {"q_proj": 3})],
)
def test_options_that_do_not_go_with_it(
    key: str, value: object, base: Path, make: Callable[..., Path]
) -> None:
    adapter = make(**CASES["embedding"], **{key: value})
    with pytest.raises(ManyloraError) as caught:
        lower(base, adapter)
    assert key in str(caught.value) or "lora_magnitude_vector" in str(caught.value)
