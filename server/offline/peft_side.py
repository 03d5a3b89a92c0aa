"""The base and an adapter as transformers and peft run them. Needs peft, of the extra `train`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from manylora.adapters_store.format import Checkpoint, read_checkpoint
from manylora.adapters_store.head import Task
from manylora.adapters_store.lowering.heads import read_task, split_head
from manylora.errors import FailedPrecondition, MissingExtra
from manylora.server.engine.model.checkpoint import is_encoder
from manylora.server.engine.model.quantised import settle

_CLASSES: dict[Task, Any] = {
    Task.CAUSAL_LM: transformers.AutoModelForCausalLM,
    Task.SEQ_CLS: transformers.AutoModelForSequenceClassification,
    Task.TOKEN_CLS: transformers.AutoModelForTokenClassification,
    Task.FEATURE_EXTRACTION: transformers.AutoModel,
}


def read_base(base: Path) -> PreTrainedConfig:
    """The base's configuration. Raises FailedPrecondition for what has none."""
    try:
        return AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FailedPrecondition(f"cannot load the base: {error}", field="base") from error


def read_adapter(directory: Path, base: PreTrainedConfig) -> Checkpoint:
    """The adapter, with the task that it has on the base where it names none: on an encoder that
    is FEATURE_EXTRACTION. Raises InvalidArgument if its files are broken."""
    checkpoint = read_checkpoint(directory)
    if checkpoint.config.get("task_type") is None and is_encoder(base):
        config = {**checkpoint.config, "task_type": Task.FEATURE_EXTRACTION.value}
        return replace(checkpoint, config=config)
    return checkpoint


def load_peft(base: Path, adapter: Checkpoint, dtype: torch.dtype, *, untied: bool = False) -> Any:
    """peft's model of the adapter, whole, for inference, on the CPU.

    untied: the head gets a weight of its own, where it has the embedding's.

    Raises:
        MissingExtra: peft is not installed.
        FailedPrecondition: transformers cannot load the base, or peft the adapter; says why.
    """
    peft = _peft()
    task = read_task(adapter.config)
    _, head = split_head(adapter)
    layers = [] if head is None else list(head.layers.values())
    options = {"num_labels": layers[-1].weight.shape[0]} if layers else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that the base lacks
        try:
            model = _CLASSES[task].from_pretrained(
                base,
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
        except (OSError, ValueError) as error:
            raise FailedPrecondition(f"cannot load the base: {error}", field="base") from error
        settle(model)
        if untied:
            _untie(model)
        try:
            return peft.PeftModel.from_pretrained(model, adapter.directory).eval()
        except Exception as error:  # peft raises what it likes
            raise FailedPrecondition(
                f"peft does not load the adapter: {error}", field="adapter"
            ) from error


def is_tied(model: Any) -> bool:
    """Whether the head's weight is the embedding's."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _untie(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


@torch.inference_mode()
def run_peft(model: nn.Module, task: Task, ids: Sequence[int]) -> Tensor:
    """What the model answers: float32 logits [len(ids), vocab], [1, labels] or
    [len(ids), labels], or, for FEATURE_EXTRACTION, hidden rows [len(ids), n]."""
    options: dict[str, Any] = {"use_cache": False} if task is Task.CAUSAL_LM else {}
    if _is_multitask(model):
        options["task_ids"] = torch.tensor([0])
    answer: Tensor = model(input_ids=torch.tensor([list(ids)]), **options)[0][0]
    rows = answer.float()
    return rows[None] if task is Task.SEQ_CLS else rows[-len(ids) :]  # behind virtual tokens


def _is_multitask(model: nn.Module) -> bool:
    configs = getattr(model, "peft_config", {}).values()
    return any(config.peft_type.value == "MULTITASK_PROMPT_TUNING" for config in configs)


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("this needs peft", wanted="pip install 'manylora[train]'") from error
    return peft
