"""A Hugging Face checkpoint on local disk → the model as transformers runs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.server.engine.model.quantised import check_quantisation, quantisation, settle

_LAYER_TYPES = {"full_attention", "sliding_attention"}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


ENCODERS = frozenset({"bert", "modernbert", "roberta", "xlm-roberta"})
"""Model types that are served as encoders; others may compute something else."""


@dataclass(slots=True, frozen=True)
class BaseCheckpoint:
    """A model, and the tensors of its own task's head, or of what is before it, that its
    checkpoint lacks: only an encoder's may."""

    model: PreTrainedModel
    lacking: frozenset[str]

    @property
    def encodes(self) -> bool:
        return is_encoder(self.model.config)


def is_encoder(config: PreTrainedConfig) -> bool:
    return config.model_type in ENCODERS and not getattr(config, "is_decoder", False)


def read_model(path: Path, dtype: str, device: torch.device) -> BaseCheckpoint:
    """Loads the checkpoint for inference, with transformers' plain ("eager") attention: a causal
    language model, or an encoder as the class that classifies its tokens, if it was trained for
    that, else sequences.

    Args:
        path: a directory with config.json and safetensors files.
        dtype: a name of `DTYPES`, or "auto" for the checkpoint's own.

    Raises:
        FailedPrecondition: not a checkpoint that can be served; says why.
        InvalidArgument: an unknown dtype.
    """
    if dtype not in (*DTYPES, "auto"):
        raise InvalidArgument("no such dtype", field="dtype", found=dtype, wanted=", ".join(DTYPES))
    config = _read_config(path)
    # bitsandbytes' weights take their final form as they come to the device
    placing = {} if quantisation(config) is None else {"device_map": {"": device}}
    try:
        model, info = _kind(config).from_pretrained(
            path,
            config=config,
            dtype=DTYPES.get(dtype, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported and refused below
            **placing,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FailedPrecondition(
            f"the base model could not be loaded: {error}", field="model"
        ) from error
    mismatched = [f"{name} {list(shape)}" for name, shape, _ in info["mismatched_keys"]]
    missing = frozenset(info["missing_keys"])
    optional = frozenset(filter(_HEAD.match, missing)) if is_encoder(config) else frozenset()
    lacking = sorted(missing - optional) + mismatched
    if lacking:
        raise FailedPrecondition(
            "the checkpoint lacks tensors of its model, or has them in another shape",
            field="model",
            found=", ".join(lacking),
        )
    if model.dtype not in DTYPES.values():
        raise FailedPrecondition(
            "the checkpoint's dtype is not served", field="dtype", found=model.dtype
        )
    model = model.eval().requires_grad_(False)
    return BaseCheckpoint(settle(model) if placing else model.to(device), optional)


_HEAD = re.compile(r"(classifier|head|[a-z_]+\.pooler)\.")


def _kind(config: PreTrainedConfig) -> Any:
    if not is_encoder(config):
        return AutoModelForCausalLM
    made = (config.architectures or [""])[0]
    if made.endswith("ForTokenClassification"):
        return AutoModelForTokenClassification
    return AutoModelForSequenceClassification


def _read_config(path: Path) -> PreTrainedConfig:
    """The configuration, if it is one of a decoder that transformers itself implements."""
    if not (path / "config.json").is_file():
        raise FailedPrecondition(
            "not a model directory",
            field="model",
            found=path,
            wanted="a directory with config.json",
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(f"config.json: {error}", field="model") from error
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise _not_served(config, "an encoder-decoder model, or one with cross attention")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder(config):
        raise _not_served(config, "neither a causal language model nor a known encoder")
    if is_encoder(config) and quantisation(config) is not None:
        raise _not_served(config, "a quantised encoder")
    check_quantisation(config)
    _check_layers(config)
    return config


def _check_layers(config: PreTrainedConfig) -> None:
    """Refuses by its configuration what a short look at load might not show."""
    text = config.get_text_config(decoder=True)
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if other:
        raise _not_served(config, f"layers of type {', '.join(other)}")
    if getattr(text, "attn_temperature_tuning", False):
        raise _not_served(config, "attention scaled by a row's place in the batch")


def _not_served(config: PreTrainedConfig, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        "this base model is not served", field="model", found=f"{config.model_type}: {what}"
    )
