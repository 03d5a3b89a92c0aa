"""A checkpoint's directory → an adapted model, or an error that says why it cannot be served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from manylora.adapters_store.edits import ModuleShape
from manylora.errors import FailedPrecondition, ManyloraError
from manylora.kernels import Backend
from manylora.server.engine.model import selfcheck
from manylora.server.engine.model.adapt import adapt
from manylora.server.engine.model.adapted import AdaptedModel
from manylora.server.engine.model.attach import ATTENTION, attach
from manylora.server.engine.model.checkpoint import BaseCheckpoint, read_model
from manylora.server.engine.model.encoder import EncoderModel
from manylora.server.engine.model.fuse import fuse
from manylora.server.engine.model.heads import decoder_forms
from manylora.server.engine.model.interface import make_interfaced
from manylora.server.engine.model.limits import eos_token_ids, max_context
from manylora.server.engine.model.load_encoder import adapt_encoder
from manylora.server.engine.model.probe import probe
from manylora.server.engine.model.product import MakeProduct, exact_products, int8_products
from manylora.server.engine.model.quantised import is_quantised_base
from manylora.server.engine.model.step import StepState, keep_hidden
from manylora.server.engine.model.task_view import TaskBase, make_views, read_task_base
from manylora.server.engine.types import Rows


def load_base(
    path: Path,
    dtype: str,
    device: torch.device,
    kernels: Backend,
    *,
    fused: bool = True,
    quantization: str = "none",
) -> AdaptedModel | EncoderModel:
    """Loads a causal language model or an encoder, as its configuration says, and makes it serve
    flat batches with per-row adapters.

    Args:
        path: directory of a Hugging Face checkpoint in safetensors.
        dtype: "auto" (the checkpoint's), "float32", "float16" or "bfloat16".
        device: where it runs.
        kernels: the backend that runs edits and attention.
        fused: use the fused decoder layers where the model has their shape.
        quantization: "none", or "int8" for 8-bit weights in the fused layers and the head.

    Raises:
        FailedPrecondition: the model is of a kind that cannot be served exactly, or broken.
    """
    base = read_model(path, dtype, device)
    try:
        if quantization == "int8":
            return _adapt_int8(base, kernels)
        if base.encodes:
            return adapt_encoder(base, kernels)
        plain = not fused or is_quantised_base(base.model)
        return _adapt(base.model, kernels, None if plain else exact_products())
    except ManyloraError:
        raise
    except Exception as error:
        raise FailedPrecondition(
            f"{type(base.model).__name__} cannot be served: its forward pass fails with our "
            f"attention: {type(error).__name__}: {error}",
            field="model",
        ) from error


def load_model(
    path: Path, dtype: str, device: torch.device, kernels: Backend, *, fused: bool = True
) -> AdaptedModel:
    """As `load_base`; raises FailedPrecondition for an encoder, too."""
    model = load_base(path, dtype, device, kernels, fused=fused)
    if isinstance(model, EncoderModel):
        raise FailedPrecondition(
            "not a causal language model", field="model", found=type(model.model).__name__
        )
    return model


def _adapt_int8(base: BaseCheckpoint, kernels: Backend) -> AdaptedModel:
    make = int8_products(base.model.device)
    if not base.encodes and not is_quantised_base(base.model):
        adapted = _adapt(base.model, kernels, make)
        if adapted.packed:
            return adapted
    raise FailedPrecondition(
        "the weights of this base cannot be made 8-bit at load",
        field="quantization",
        found=type(base.model).__name__,
        wanted="a decoder whose layers are fused, with weights of 16 or 32 bits",
    )


def _adapt(model: PreTrainedModel, kernels: Backend, make: MakeProduct | None) -> AdaptedModel:
    """make: of the fused layers' products; None to leave the layers as they are."""
    selfcheck.check_positions(model)
    head = _head(model)
    make_interfaced(model)
    seen = probe(model, head)
    step = StepState.idle(kernels, model.dtype, model.device)
    modules = adapt(model, seen.rowwise, head, seen.others, step)
    layers = attach(seen.attention, step)
    model.config._attn_implementation = ATTENTION
    keep_hidden(model, step)
    packed = fuse(model, layers, step, make, tied=modules[head].tied) if make else {}
    if packed:
        _let_go_of_file(model)
    adapted = AdaptedModel(
        model=model,
        step=step,
        layers=layers,
        modules=modules,
        vocab_size=modules[head].out_size,
        max_context=max_context(model.config),
        eos_token_ids=eos_token_ids(model),
        packed=packed,
        tasks=_tasks(model, modules),
    )
    selfcheck.check_rows(adapted)
    return adapted


def _let_go_of_file(model: PreTrainedModel) -> None:
    """Copies what remains of the model out of its checkpoint, which is mapped into memory whole for
    as long as any of its tensors is in use."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _tasks(model: PreTrainedModel, modules: Mapping[str, ModuleShape]) -> TaskBase:
    forms = decoder_forms(model.config)
    views = make_views(modules, model.base_model_prefix, forms, generates=True)
    return read_task_base(model.config, views, Rows.LAST)


def _head(model: PreTrainedModel) -> str:
    """Name of the output embedding, which must be a plain Linear."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and type(module) is nn.Linear:
            return str(name)
    raise FailedPrecondition(
        f"{type(model).__name__} cannot be served",
        field="model",
        found=f"a head of type {type(head).__name__}",
        wanted="Linear",
    )
