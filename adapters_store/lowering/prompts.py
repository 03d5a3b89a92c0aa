"""Prompt learning: rows of the embedding, or keys and values, that come before every prompt.

Lester et al. 2021, prompt tuning (arXiv:2104.08691); Wang et al. 2023, multitask prompt tuning
(arXiv:2303.02861): row i is shared_i ∘ (cols rows)_i of its task; Liu et al. 2021, P-tuning
(arXiv:2103.10385), whose encoder peft runs when it saves; Blau et al. 2024, CPT
(arXiv:2410.17222); Li and Liang 2021, prefix tuning (arXiv:2101.00190); Eyuboglu et al. 2025,
Cartridges (arXiv:2506.06266). Right is what peft 0.21.2 computes after
`PeftModel.from_pretrained` (`PeftModelForCausalLM.forward`): the prompt's own positions follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from manylora.adapters_store.edits import LoweredAdapter, ModuleShape
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering.base_copies import BaseParameter
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.method import Shape, check_shape
from manylora.errors import FailedPrecondition, InvalidArgument

Tensors: TypeAlias = Mapping[str, torch.Tensor]

_ROWS = "prompt_embeddings"
_COLS, _TASK_ROWS = "prefix_task_cols", "prefix_task_rows"
_MOST = 1 << 20  # of any size in a config

_SIZES = ("num_virtual_tokens", "token_dim", "num_layers")
_INITIAL = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
)
_SOURCE = ("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
_ENCODER = (
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
)
_CPT_TRAINING = (
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_weighted_loss_type",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "tokenizer_name_or_path",
)
_OFF: Mapping[str, tuple[object, ...]] = {
    "num_transformer_submodules": (1, None),
    "modules_to_save": (None, []),
}


@dataclass(slots=True, frozen=True)
class PromptFamily:
    """One method. shapes: the file's tensors, exactly; lower: these tensors to the adapter."""

    keys: KnownKeys
    shapes: Callable[[ConfigReader], Mapping[str, Shape]]
    lowered: Callable[[ConfigReader, Tensors], LoweredAdapter]

    def check(self, checkpoint: Checkpoint, limits: Limits) -> int:  # noqa: ARG002
        """Checks config and tensors against each other; there is no rank: 0."""
        self._read(checkpoint)
        return 0

    def lower(
        self,
        checkpoint: Checkpoint,
        modules: Mapping[str, ModuleShape],  # noqa: ARG002
        parameter: BaseParameter | None,  # noqa: ARG002
    ) -> LoweredAdapter:
        """Whether the rows fit the base is seen where its embedding and its cache are known."""
        reader = self._read(checkpoint)
        return self.lowered(reader, checkpoint.load(self.shapes(reader)))

    def _read(self, checkpoint: Checkpoint) -> ConfigReader:
        reader = ConfigReader(checkpoint.config)
        reader.check_keys(self.keys)
        wanted = self.shapes(reader)
        for name, info in checkpoint.tensors.items():
            if name not in wanted:
                raise FailedPrecondition(
                    "tensors of this kind are not served",
                    field=f"{WEIGHTS_FILE}: {name}",
                    wanted=" and ".join(wanted),
                )
            check_shape(info.shape, wanted[name], name)
        for name in wanted.keys() - checkpoint.tensors.keys():
            raise InvalidArgument("the tensor is absent", field=f"{WEIGHTS_FILE}: {name}")
        return reader


def _tokens(reader: ConfigReader) -> int:
    return reader.whole_number("num_virtual_tokens", least=1, most=_MOST)


def _size(reader: ConfigReader, key: str) -> int | None:
    """None where the config leaves the size to the base."""
    if reader.config.get(key) is None:
        return None
    return reader.whole_number(key, least=1, most=_MOST)


def _row_shapes(reader: ConfigReader) -> Mapping[str, Shape]:
    return {_ROWS: (_tokens(reader), _size(reader, "token_dim"))}


def _rows(reader: ConfigReader, tensors: Tensors) -> LoweredAdapter:  # noqa: ARG001
    return LoweredAdapter(edits={}, virtual_tokens=tensors[_ROWS])


def _cpt_shapes(reader: ConfigReader) -> Mapping[str, Shape]:
    """peft counts the virtual tokens by the list of token ids, whatever their number's key says."""
    ids = reader.config.get("cpt_token_ids")
    if not isinstance(ids, list) or not ids:
        raise InvalidArgument("no token ids", field=reader.field("cpt_token_ids"), wanted="a list")
    return {_ROWS: (len(ids), _size(reader, "token_dim"))}


def _multitask_shapes(reader: ConfigReader) -> Mapping[str, Shape]:
    tasks = reader.whole_number("num_tasks", least=1, most=_MOST)
    if tasks > 1:
        raise FailedPrecondition(
            "an adapter of several tasks is not served: requests do not name a task",
            field=reader.field("num_tasks"),
            found=tasks,
            wanted="1",
        )
    ranks = reader.whole_number("num_ranks", least=1, most=_MOST)
    tokens, width = _tokens(reader), _size(reader, "token_dim")
    return {_ROWS: (tokens, width), _COLS: (1, tokens, ranks), _TASK_ROWS: (1, ranks, width)}


def _multitask(reader: ConfigReader, tensors: Tensors) -> LoweredAdapter:  # noqa: ARG001
    task = tensors[_COLS][0].float() @ tensors[_TASK_ROWS][0].float()
    return LoweredAdapter(edits={}, virtual_tokens=tensors[_ROWS].float() * task)


def _prefix_shapes(reader: ConfigReader) -> Mapping[str, Shape]:
    layers, width = _size(reader, "num_layers"), _size(reader, "token_dim")
    if layers is None or width is None:
        key = "num_layers" if layers is None else "token_dim"
        raise InvalidArgument(
            "the prefix's sizes are not told", field=reader.field(key), wanted="as peft saves it"
        )
    return {_ROWS: (_tokens(reader), 2 * layers * width)}


def _prefix(reader: ConfigReader, tensors: Tensors) -> LoweredAdapter:
    rows = tensors[_ROWS]
    layers = _size(reader, "num_layers")
    assert layers is not None
    return LoweredAdapter(edits={}, prefix=rows.reshape(len(rows), layers, 2, -1))


def _known(*harmless: str, understood: tuple[str, ...] = ()) -> KnownKeys:
    return KnownKeys((*_SIZES, *understood), ("num_attention_heads", *harmless), _OFF)


PROMPT_TUNING = PromptFamily(_known(*_INITIAL), _row_shapes, _rows)
P_TUNING = PromptFamily(_known(*_ENCODER), _row_shapes, _rows)
CPT = PromptFamily(_known(*_CPT_TRAINING, understood=("cpt_token_ids",)), _cpt_shapes, _rows)
MULTITASK_PROMPT_TUNING = PromptFamily(
    _known(*_INITIAL, *_SOURCE, understood=("num_tasks", "num_ranks")),
    _multitask_shapes,
    _multitask,
)
PREFIX_TUNING = PromptFamily(
    _known("encoder_hidden_size", "prefix_projection", "init_weights"), _prefix_shapes, _prefix
)
CARTRIDGE = PromptFamily(_known("num_frozen_tokens"), _prefix_shapes, _prefix)
