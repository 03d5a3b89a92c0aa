"""`ensure_weight_tying`: what LoRA trains of the embedding acts on a head that is tied to it, too.

peft gives the head the embedding's pair the other way round, A = Bᵀ and B = Aᵀ, or the
embedding's saved copy; its config names the embedding alone, its file has the tensors of both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering.alora import WithInvocation
from manylora.adapters_store.lowering.base_copies import BaseParameter, check_base_copies
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.initial import Init, read_init
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.tensors import PREFIX
from manylora.adapters_store.lowering.tied import tied_modules
from manylora.errors import FailedPrecondition, InvalidArgument

KEY = "ensure_weight_tying"

_PLAIN: Mapping[str, tuple[object, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}
_HEAD_TENSOR = re.compile(
    r"(?P<head>lm_head|embed_out)\."
    r"(?:(?P<part>lora_A|lora_B|base_layer|modules_to_save)(?:\.[^.]+)?\.)?weight"
)
_SAVED = "weight"
_NAMES = ("embed_tokens", "lm_head")


@dataclass(slots=True, frozen=True)
class Tying:
    """LoRA, whose config may also have `ensure_weight_tying`."""

    family: WithInvocation

    @property
    def keys(self) -> KnownKeys:
        keys = self.family.keys
        off = {key: values for key, values in keys.off.items() if key != KEY}
        return replace(keys, understood=(*keys.understood, KEY), off=off)

    def check(self, checkpoint: Checkpoint, limits: Limits) -> int:
        rest, _ = _split(checkpoint)
        return self.family.check(rest, limits)

    def lower(
        self,
        checkpoint: Checkpoint,
        modules: Mapping[str, ModuleShape],
        parameter: BaseParameter | None,
    ) -> LoweredAdapter:
        rest, heads = _split(checkpoint)
        lowered = self.family.lower(rest, modules, parameter)
        embeddings = {
            module: edit
            for module, edit in lowered.edits.items()
            if modules[module].kind is ModuleKind.EMBEDDING and edit.token_ids is None
        }
        tied = {
            head: edit
            for module, edit in embeddings.items()
            if _ties(ConfigReader(checkpoint.config))
            for head in tied_modules(module, modules)
        }
        edits = {head: _of_head(checkpoint.config, edit) for head, edit in tied.items()}
        for head, tensors in heads.items():
            _check(checkpoint, head, tensors, edits.get(head, ModuleEdit()), parameter)
        return replace(lowered, edits={**lowered.edits, **edits})


def _split(checkpoint: Checkpoint) -> tuple[Checkpoint, Mapping[str, Mapping[str, str]]]:
    """The checkpoint without the option and tied heads' tensors; these, by head and part."""
    config = {key: value for key, value in checkpoint.config.items() if key != KEY}
    if not ConfigReader(checkpoint.config).boolean(KEY):
        return replace(checkpoint, config=config), {}
    heads: dict[str, dict[str, str]] = {}
    rest = dict(checkpoint.tensors)
    for tensor in checkpoint.tensors:
        match = _HEAD_TENSOR.fullmatch(tensor.removeprefix(PREFIX))
        if match is None:
            continue
        part = match["part"] if match["part"] not in (None, "modules_to_save") else _SAVED
        if part in heads.setdefault(match["head"], {}):
            raise InvalidArgument("two tensors of one meaning", field=f"{WEIGHTS_FILE}: {tensor}")
        heads[match["head"]][part] = tensor
        del rest[tensor]
    return replace(checkpoint, config=config, tensors=rest), heads


def _ties(reader: ConfigReader) -> bool:
    """Whether peft would: it looks for its own names of embeddings in the config."""
    if not reader.boolean(KEY):
        return False
    names = (*reader.texts("modules_to_save"), *reader.texts("target_modules"))
    pattern = reader.config.get("target_modules")
    if isinstance(pattern, str):
        names = reader.texts("modules_to_save")
        if any(Matcher().fullmatch(pattern, name, "target_modules") for name in _NAMES):
            return True
    return any(name.rpartition(".")[2] in _NAMES for name in names)


def _of_head(config: Mapping[str, object], edit: ModuleEdit) -> ModuleEdit:
    """edit: the embedding's."""
    if edit.weight is not None:
        return ModuleEdit(weight=edit.weight)
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise _refusal(key, config[key])
    if read_init(ConfigReader(config)) is not Init.PLAIN:
        raise _refusal("init_lora_weights", config["init_lora_weights"])
    assert edit.a is not None
    assert edit.b is not None
    return ModuleEdit(a=edit.b.T.contiguous(), b=edit.a.T.contiguous(), scale=edit.scale)


def _refusal(key: str, found: object) -> FailedPrecondition:
    return FailedPrecondition(
        "not served for an embedding that is tied to the head",
        field=f"{CONFIG_FILE}: {key}",
        found=ascii(found),
        wanted=f"none, or no {KEY}",
    )


def _check(
    checkpoint: Checkpoint,
    head: str,
    tensors: Mapping[str, str],
    edit: ModuleEdit,
    parameter: BaseParameter | None,
) -> None:
    """The head's tensors are the embedding's; a copy of the base's is the base's."""
    own = {"lora_A": edit.a, "lora_B": edit.b, _SAVED: edit.weight}
    loaded = checkpoint.load(tensors.values())
    for part, tensor in tensors.items():
        wanted = own.get(part)
        if part == "base_layer" or (part == _SAVED and wanted is None):
            check_base_copies(checkpoint, {f"{head}.weight": tensor}, parameter)
        elif wanted is None or not torch.equal(loaded[tensor].to(wanted.dtype), wanted):
            raise FailedPrecondition(
                "not what the adapter has for an embedding that the head is tied to",
                field=f"{WEIGHTS_FILE}: {tensor}",
            )
