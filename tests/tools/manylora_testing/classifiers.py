"""Adapters that classify or embed, made by peft, and what transformers + peft make of them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from manylora_testing.models import randomise
from manylora_testing.tokenizer import TOKENIZER_VOCAB

_SIZES: dict[str, Any] = {
    "vocab_size": TOKENIZER_VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ENCODERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "bert": (hf.BertConfig, {}),
    "roberta": (hf.RobertaConfig, {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": (hf.XLMRobertaConfig, {"pad_token_id": 1, "type_vocab_size": 1}),
    "modernbert": (
        hf.ModernBertConfig,
        {"local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    ),
    "modernbert-mean": (
        hf.ModernBertConfig,
        {"local_attention": 8, "classifier_pooling": "mean"},
    ),
}
"""Name → class of the configuration, and what is not as in the others."""


def tiny_encoder(arch: str, directory: Path, **changes: Any) -> Path:
    """Saves a random encoder as a checkpoint of a masked language model with BERT's pooler: what
    the classes for other tasks find in it is all but the classifier."""
    kind, options = ENCODERS[arch]
    config = kind(**{**_SIZES, **options, **changes})
    auto = hf.AutoModelForPreTraining if arch == "bert" else hf.AutoModelForMaskedLM
    model = auto.from_config(config, dtype=torch.float32)
    randomise(model, zlib.crc32(arch.encode()))
    model.save_pretrained(directory)
    return directory


AUTO = {
    "SEQ_CLS": hf.AutoModelForSequenceClassification,
    "TOKEN_CLS": hf.AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": hf.AutoModel,
}
LABELS = 3


def task_model(base: Path, task: str, num_labels: int = LABELS) -> Any:
    """transformers' class for the task on the base, in float32; a head that the base lacks is
    random."""
    options = {} if task == "FEATURE_EXTRACTION" else {"num_labels": num_labels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AUTO[task].from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager", **options
        )
    return model.eval()


def make_task_adapter(
    base: Path, directory: Path, task: str, config: peft.PeftConfig, num_labels: int = LABELS
) -> Path:
    """Saves an adapter for the task with weights that matter; its head, too."""
    seed = zlib.crc32(f"{base.name} {directory.name}".encode())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config.task_type = task
        model = peft.get_peft_model(task_model(base, task, num_labels), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                width = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
                parameter.data.copy_(_scale(name) * width * torch.randn(parameter.shape))
        model.save_pretrained(directory)
    return directory


def _scale(name: str) -> float:
    return 0.4 if "lora_B" in name else 1.0


@torch.no_grad()
def peft_answer(
    base: Path,
    adapter: Path | None,
    task: str,
    ids: Sequence[int],
    token_types: Sequence[int] = (),
) -> Tensor:
    """What peft computes: logits [labels] or [len(ids), labels], or hidden rows [len(ids), n];
    without the rows of virtual tokens."""
    model: Any
    if adapter is None:
        model = task_model(base, task)
    else:
        model = task_model(base, task, _labels_of(adapter))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
    types = {"token_type_ids": torch.tensor([list(token_types)])} if token_types else {}
    output = model(input_ids=torch.tensor([list(ids)]), **types)
    answer: Tensor = output[0][0].float()
    return answer if answer.dim() == 1 else answer[-len(ids) :]


def _labels_of(adapter: Path) -> int:
    """How many labels the adapter's head has."""
    last = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    tensors = load_file(adapter / "adapter_model.safetensors")
    return next((len(t) for name, t in tensors.items() if name.endswith(last)), LABELS)
