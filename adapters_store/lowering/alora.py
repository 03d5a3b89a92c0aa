"""aLoRA: a LoRA that acts from its invocation tokens on, and leaves what is before to the base.

Greenewald et al. 2025, Activated LoRA (arXiv:2504.12397). peft (`tuners/lora/variants.py`): the
last occurrence of the tokens in the prompt counts, from its first token on all rows get the edit,
also the generated ones; without an occurrence none does. What peft does to every row all the same
(other biases, DoRA, saved modules, trained tokens) is refused beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from manylora.adapters_store.edits import LoweredAdapter, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering.base_copies import BaseParameter
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys, whole_number
from manylora.adapters_store.lowering.initial import Init, read_init
from manylora.adapters_store.lowering.trained_tokens import BESIDE, BesideLora
from manylora.errors import FailedPrecondition, InvalidArgument

KEY = "alora_invocation_tokens"

_MOST = 1 << 31
_NOT_BESIDE = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    BESIDE: (None, [], {}),
}


@dataclass(slots=True, frozen=True)
class WithInvocation:
    """LoRA, whose config may also have `alora_invocation_tokens`."""

    family: BesideLora

    @property
    def keys(self) -> KnownKeys:
        keys = self.family.keys
        off = {key: values for key, values in keys.off.items() if key != KEY}
        return replace(keys, understood=(*keys.understood, KEY), off=off)

    def check(self, checkpoint: Checkpoint, limits: Limits) -> int:
        _read(checkpoint.config)
        return self.family.check(_plain(checkpoint), limits)

    def lower(
        self,
        checkpoint: Checkpoint,
        modules: Mapping[str, ModuleShape],
        parameter: BaseParameter | None,
    ) -> LoweredAdapter:
        invocation = _read(checkpoint.config)
        lowered = self.family.lower(_plain(checkpoint), modules, parameter)
        for module, edit in lowered.edits.items():
            if invocation and edit.on_gather:
                raise FailedPrecondition(
                    "peft has no aLoRA of an embedding", field=f"{CONFIG_FILE}: {KEY}", found=module
                )
        return replace(lowered, invocation=invocation)


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    config = {key: value for key, value in checkpoint.config.items() if key != KEY}
    return replace(checkpoint, config=config)


def _read(config: Mapping[str, object]) -> tuple[int, ...]:
    """Empty for a LoRA that always acts."""
    value, field = config.get(KEY), f"{CONFIG_FILE}: {KEY}"
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise InvalidArgument(
            "the config's value is wrong", field=field, found=ascii(value), wanted="token ids"
        )
    invocation = tuple(whole_number(token, KEY, least=0, most=_MOST) for token in value)
    for key, allowed in _NOT_BESIDE.items():
        if config.get(key) not in allowed:
            raise _refusal(key, config[key])
    if read_init(ConfigReader(config)) is not Init.PLAIN:
        raise _refusal("init_lora_weights", config["init_lora_weights"])
    if config.get("task_type") != "CAUSAL_LM":
        raise FailedPrecondition(
            "peft activates an aLoRA for this task alone",
            field=f"{CONFIG_FILE}: task_type",
            found=config.get("task_type"),
            wanted="CAUSAL_LM",
        )
    return invocation


def _refusal(key: str, found: object) -> FailedPrecondition:
    return FailedPrecondition(
        "acts on all rows, so an aLoRA with it cannot leave any to the base",
        field=f"{CONFIG_FILE}: {key}",
        found=ascii(found),
        wanted=f"none, or no {KEY}",
    )
