"""An encoder's checkpoint, as transformers runs it → adapted to flat batches of whole sequences."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.adapters_store.head import Head, HeadLayer, Task
from manylora.errors import FailedPrecondition
from manylora.kernels import Backend, make_plan
from manylora.server.engine.model.adapt import adapt
from manylora.server.engine.model.checkpoint import BaseCheckpoint
from manylora.server.engine.model.encoder import (
    ATTENTION,
    LAYER,
    SPANS,
    AsidePooler,
    EncoderInputs,
    EncoderModel,
    Spans,
    run_stem,
)
from manylora.server.engine.model.heads import encoder_forms, head_layers
from manylora.server.engine.model.probe import counting_rows
from manylora.server.engine.model.probe_others import watch_others
from manylora.server.engine.model.step import StepState, keep_hidden
from manylora.server.engine.model.task_view import make_views, read_task_base
from manylora.server.engine.types import Rows

_ROWS = 13
_MOST_ROWS = 300  # of a sequence in the last look: more than the windows there are
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference of hidden rows to transformers' own, over their largest value."""


@torch.inference_mode()
def adapt_encoder(checkpoint: BaseCheckpoint, kernels: Backend) -> EncoderModel:
    """Raises FailedPrecondition if the model would not compute what transformers computes."""
    model = checkpoint.model
    samples = _samples(model)
    wanted = [model.base_model(input_ids=ids[None]).last_hidden_state[0] for ids in samples]
    stem, stems = _stems(model, checkpoint.lacking)
    linears, others = _look(model, stem)
    step = StepState.idle(kernels, model.dtype, model.device)
    modules = adapt(model, linears, None, others, step)
    keep_hidden(model, step)
    spans = Spans()
    attentions = [module for module in model.base_model.modules() if hasattr(module, "is_causal")]
    for i, module in enumerate(attentions):
        setattr(module, SPANS, spans)
        setattr(module, LAYER, i)
    model.config._attn_implementation = ATTENTION
    views = make_views(
        modules, model.base_model_prefix, encoder_forms(model.config, stems), generates=False
    )
    own = _own_head(model, checkpoint.lacking)
    if own is not None and own.task not in views:
        own = None
    pad = model.config.pad_token_id
    counts_from_pad = model.config.model_type in ("roberta", "xlm-roberta")
    first = pad + 1 if counts_from_pad else 0
    encoder = EncoderModel(
        model=model,
        step=step,
        modules=modules,
        spans=spans,
        vocab_size=model.config.vocab_size,
        max_context=model.config.max_position_embeddings - first,
        tasks=replace(read_task_base(model.config, views, Rows.MEAN), head=own),
        first_position=first,
        skips_padding=counts_from_pad,
        kv_layout=_kv_layout(model, attentions),
    )
    _check(encoder, samples, wanted)
    return encoder


def _stems(model: PreTrainedModel, lacking: frozenset[str]) -> tuple[str, Mapping[Task, str]]:
    """The base's own module before its heads, "" if none; and the same by the tasks that can be
    served: not those whose module the checkpoint lacks, which transformers would make up."""
    prefix = model.base_model_prefix
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        pooler.__class__ = AsidePooler
    if model.config.model_type == "modernbert":
        stem, by_task = "head", {Task.SEQ_CLS: "head", Task.TOKEN_CLS: "head"}
    elif model.config.model_type == "bert":
        stem = f"{prefix}.pooler" if pooler is not None else ""
        by_task = {Task.TOKEN_CLS: "", **({Task.SEQ_CLS: stem} if stem else {})}
    else:
        return "", {Task.SEQ_CLS: "", Task.TOKEN_CLS: ""}
    absent = stem and any(name.startswith(f"{stem}.") for name in lacking)
    return stem, {task: own for task, own in by_task.items() if not (own and absent)}


def _kv_layout(model: PreTrainedModel, attentions: list[nn.Module]) -> list[tuple[int, int]]:
    """Of a model that takes keys and values before the text: peft asks its signature."""
    if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        return []
    return [(int(m.num_attention_heads), int(m.attention_head_size)) for m in attentions]  # type: ignore[arg-type]


def _look(model: PreTrainedModel, stem: str) -> tuple[list[str], list[str]]:
    """Names of the linear modules, and of the norms and the embedding, that treat each row by
    itself; of the base and of what is before its heads."""
    ids = torch.arange(_ROWS, device=model.device)[None]
    with counting_rows(model) as counts, watch_others(model, _ROWS) as watched:
        model.base_model(input_ids=ids)
        if stem:
            rows: Tensor = model.get_input_embeddings().weight[:_ROWS]
            run_stem(model.get_submodule(stem), rows)
    return [n for n, _ in model.named_modules() if counts.get(n) == {_ROWS}], watched()


def _own_head(model: PreTrainedModel, lacking: frozenset[str]) -> Head | None:
    """Of a checkpoint that was trained to classify."""
    if any(name.startswith("classifier.") for name in lacking):
        return None
    names = head_layers(type(model), model.config)
    found = {name: model.get_submodule(name) for name in names}
    of_tokens = type(model).__name__.endswith("ForTokenClassification")
    return Head(
        Task.TOKEN_CLS if of_tokens else Task.SEQ_CLS,
        {name: HeadLayer(layer.weight, layer.bias) for name, layer in found.items()},
    )


def _samples(model: PreTrainedModel) -> list[Tensor]:
    """Sequences of token ids, from anywhere in the vocabulary but padding."""
    longest = min(_MOST_ROWS, model.config.max_position_embeddings - 3)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (min(5, longest), longest, 1):
        ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
        ids[ids == (model.config.pad_token_id or 0)] = model.config.vocab_size - 1
        samples.append(ids.to(model.device))
    return samples


def _check(encoder: EncoderModel, samples: list[Tensor], wanted: list[Tensor]) -> None:
    """All samples in one flat batch give what transformers gave for each."""
    ends = torch.tensor([0, *map(len, samples)]).cumsum(0).tolist()
    positions = [i for ids in samples for i in encoder.positions(ids.tolist(), 0)]
    rows = make_plan(torch.full((ends[-1],), -1, dtype=torch.int32).numpy(), encoder.device)
    encoder.forward(
        EncoderInputs(
            token_ids=torch.cat(samples),
            positions=torch.tensor(positions, device=encoder.device),
            plan=rows,
            spans=list(itertools.pairwise(ends)),
            prefixes=[None] * len(samples),
        )
    )
    right = torch.cat(wanted).float()
    difference = (encoder.step.hidden.float() - right).abs().max() / right.abs().max()
    if not float(difference) <= _TOLERANCE[encoder.dtype]:
        raise FailedPrecondition(
            f"{type(encoder.model).__name__} cannot be served: sequences of a flat batch do not "
            "get what transformers computes for each",
            field="model",
            found=f"a relative difference of {float(difference):.1e}",
        )
