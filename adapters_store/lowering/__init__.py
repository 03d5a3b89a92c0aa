"""Each PEFT method turned into edits: one module a family, found by `peft_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from manylora.adapters_store.edits import LoweredAdapter, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering import (
    adalora,
    alora,
    beft,
    deft,
    delora,
    glora,
    gralora,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    prompts,
    tinylora,
    trained_tokens,
    tying,
    unilora,
    vblora,
    vera,
)
from manylora.adapters_store.lowering.base_copies import BaseParameter
from manylora.adapters_store.lowering.heads import check_pooler, read_task, split_head
from manylora.errors import FailedPrecondition, InvalidArgument

__all__ = [
    "FAMILIES",
    "BaseParameter",
    "check_config",
    "check_pooler",
    "lower",
    "peft_type",
    "read_task",
]


class Family(Protocol):
    """One PEFT method; see `check_config` and `lower`."""

    def check(self, checkpoint: Checkpoint, limits: Limits) -> int: ...

    def lower(
        self,
        checkpoint: Checkpoint,
        modules: Mapping[str, ModuleShape],
        parameter: BaseParameter | None,
    ) -> LoweredAdapter: ...


FAMILIES: Mapping[str, Family] = {
    "ADALORA": adalora.FAMILY,
    "BEFT": beft.FAMILY,
    "CARTRIDGE": prompts.CARTRIDGE,
    "CPT": prompts.CPT,
    "DEFT": deft.FAMILY,
    "DELORA": delora.FAMILY,
    "GLORA": glora.FAMILY,
    "GRALORA": gralora.FAMILY,
    "HRA": hra.FAMILY,
    "IA3": ia3.FAMILY,
    "LN_TUNING": ln_tuning.FAMILY,
    "LOHA": loha.FAMILY,
    "LOKR": lokr.FAMILY,
    "LORA": tying.Tying(alora.WithInvocation(trained_tokens.BesideLora(lora.FAMILY))),
    "MISS": miss.FAMILY,
    "MULTITASK_PROMPT_TUNING": prompts.MULTITASK_PROMPT_TUNING,
    "PREFIX_TUNING": prompts.PREFIX_TUNING,
    "PROMPT_TUNING": prompts.PROMPT_TUNING,
    "PVERA": vera.PVERA,
    "P_TUNING": prompts.P_TUNING,
    "TINYLORA": tinylora.FAMILY,
    "TRAINABLE_TOKENS": trained_tokens.FAMILY,
    "UNILORA": unilora.FAMILY,
    "VBLORA": vblora.FAMILY,
    "VERA": vera.FAMILY,
}


def peft_type(checkpoint: Checkpoint) -> str:
    """The method's name, one that is served.

    Raises FailedPrecondition for any other, InvalidArgument where there is none.
    """
    value = checkpoint.config.get("peft_type")
    field, wanted = f"{CONFIG_FILE}: peft_type", "one of " + ", ".join(FAMILIES)
    if not isinstance(value, str):
        raise InvalidArgument("not a PEFT type", field=field, found=ascii(value), wanted=wanted)
    if value not in FAMILIES:
        raise FailedPrecondition(
            "this PEFT type is not served (`manylora merge` makes a base of what peft can merge)",
            field=field,
            found=ascii(value),
            wanted=wanted,
        )
    return value


def check_config(checkpoint: Checkpoint, limits: Limits) -> int:
    """Checks config and tensor names and shapes against each other, without a base.

    Returns the adapter's largest rank (0 for a method without low-rank parts). Raises
    InvalidArgument for a checkpoint that contradicts itself, FailedPrecondition for one that is
    sound but not served; both name the key or tensor.
    """
    rest, _ = split_head(checkpoint)
    return _family(checkpoint).check(rest, limits)


def lower(
    checkpoint: Checkpoint,
    modules: Mapping[str, ModuleShape],
    parameter: BaseParameter | None = None,
) -> LoweredAdapter:
    """Turns the adapter into edits of the base's modules, completely or not at all.

    modules: every adaptable module of the base, by its name in the tree of the adapter's task (see
    `read_task`). parameter: the base's own weights, for adapters that can only be judged or lowered
    beside them; without it those are refused. Raises FailedPrecondition naming the tensor, its
    shape and the shape wanted where the adapter does not fit, and what check_config raises.
    """
    rest, head = split_head(checkpoint)
    lowered = _family(checkpoint).lower(rest, modules, parameter)
    return replace(lowered, head=head)


def _family(checkpoint: Checkpoint) -> Family:
    family = FAMILIES[peft_type(checkpoint)]
    if isinstance(family, prompts.PromptFamily) and checkpoint.config.get("task_type") is None:
        raise FailedPrecondition(
            "without a task peft puts nothing before a prompt",
            field=f"{CONFIG_FILE}: task_type",
            found="null",
            wanted="the task it was trained for",
        )
    return family
