"""An adapter merged into its base by peft: a checkpoint of its own, that needs no adapter."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig

from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.head import Task
from manylora.adapters_store.lowering.heads import read_task, split_head
from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.server.engine.model.checkpoint import DTYPES
from manylora.server.engine.model.quantised import quantisation
from manylora.server.offline.peft_side import (
    is_tied,
    load_peft,
    read_adapter,
    read_base,
    run_peft,
)

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Of the largest logit, or of 1: how far what was saved may be from the adapter on its base. What
goes wrong in a merge does so by far more."""
_PROBE_TOKENS = 12


def merge(base: Path, adapter: Path, out: Path, *, dtype: str = "auto") -> Path:
    """Writes the base with the adapter in its weights: config, safetensors, tokenizer.

    Merged in float32 and then rounded once. The checkpoint is read back and asked, and only kept
    if it answers as the adapter on its base does.

    Args:
        dtype: of the weights written; "auto": the base's.
        out: a directory that is not there yet, or is empty.

    Raises:
        InvalidArgument: `out` is taken, or the adapter's files are broken.
        FailedPrecondition: peft cannot merge it, or what comes of it computes something else.
        MissingExtra: peft is not installed.
    """
    if dtype not in (*DTYPES, "auto"):
        raise InvalidArgument("no such dtype", field="dtype", found=dtype, wanted=", ".join(DTYPES))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument("is taken", field="out", found=out, wanted="a new directory")
    config = read_base(base)
    _check_base(config)
    checkpoint = read_adapter(adapter, config)
    model = load_peft(base, checkpoint, torch.float32)
    probe = _Probe.of(model, read_task(checkpoint.config))
    tied = is_tied(model.get_base_model())
    merged = _merge(model, checkpoint)
    kept = (config.dtype or torch.float32) if dtype == "auto" else DTYPES[dtype]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as directory:
        made = Path(directory) / "merged"
        difference = _save(merged, made, kept, probe)
        if tied and not difference <= probe.allowed(kept):  # an edit of one of two that are one
            model = load_peft(base, checkpoint, torch.float32, untied=True)
            difference = _save(_merge(model, checkpoint), made, kept, probe)
        if not difference <= probe.allowed(kept):
            raise FailedPrecondition(
                "merged, it computes something else than beside its base",
                field="adapter",
                found=f"logits that differ by {difference:.2g}",
                wanted=f"at most {probe.allowed(kept):.2g}",
            )
        _save_tokenizer(base, made)
        if out.exists():
            out.rmdir()
        shutil.move(made, out)
    return out


@dataclass(slots=True, frozen=True)
class _Probe:
    """A prompt, and what the adapter on its base answers: float32, as `run_peft`."""

    task: Task
    ids: list[int]
    wanted: Tensor

    @staticmethod
    def of(model: Any, task: Task) -> _Probe:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab, (_PROBE_TOKENS,), generator=generator).tolist()
        return _Probe(task, ids, run_peft(model, task, ids))

    def difference(self, model: nn.Module) -> float:
        """The largest of the model's answer to the wanted one."""
        return float((run_peft(model, self.task, self.ids) - self.wanted).abs().max())

    def allowed(self, dtype: torch.dtype) -> float:
        return _TOLERANCE[dtype] * max(1.0, float(self.wanted.abs().max()))


def _check_base(config: PreTrainedConfig) -> None:
    if quantisation(config) is not None:
        raise FailedPrecondition(
            "merged into quantised weights, an adapter is rounded away",
            field="base",
            found=config.model_type,
            wanted="the base before it was quantised",
        )


def _merge(model: Any, checkpoint: Checkpoint) -> Any:
    """The base's class of transformers again, with other weights."""
    kind = checkpoint.config.get("peft_type")
    if not hasattr(model.base_model, "merge_and_unload"):  # tokens before the prompt
        raise _refusal(kind, "it does not change the base's weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _label(model.merge_and_unload(safe_merge=True), checkpoint)
        except Exception as error:  # peft raises what it likes
            raise _refusal(kind, str(error) or type(error).__name__) from error


def _refusal(kind: object, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"peft cannot merge it: {why}", field="adapter", found=kind)


def _label(merged: Any, checkpoint: Checkpoint) -> Any:
    """With the labels that the adapter's config names, if it does."""
    _, head = split_head(checkpoint)
    if head is not None and head.labels:
        merged.config.id2label = dict(enumerate(head.labels))
        merged.config.label2id = {label: i for i, label in enumerate(head.labels)}
    if head is not None and head.problem is not None:
        merged.config.problem_type = head.problem.value
    return merged


def _save(merged: Any, made: Path, dtype: torch.dtype, probe: _Probe) -> float:
    """Writes the checkpoint and reads it back; how far its answer is from the wanted one."""
    shutil.rmtree(made, ignore_errors=True)
    merged.to(dtype).save_pretrained(made)
    saved = type(merged).from_pretrained(
        made, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return probe.difference(saved.eval())


def _save_tokenizer(base: Path, made: Path) -> None:
    """The base's, if it has one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError):
        return
    tokenizer.save_pretrained(made)
