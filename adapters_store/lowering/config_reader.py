"""Typed reading of `adapter_config.json`; every key is understood, harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from manylora.adapters_store.files import CONFIG_FILE
from manylora.errors import FailedPrecondition, InvalidArgument

# peft's PeftConfig and PeftConfigMixin: where the adapter comes from, not what it computes
COMMON_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
_TASK_TYPES = (None, "CAUSAL_LM")


@dataclass(slots=True, frozen=True)
class KnownKeys:
    """What one PEFT method's config may hold.

    understood: read by the lowering. harmless: never change what the adapter computes once it is
    trained. off: options that are not served, with the values that mean 'not used' (null where
    peft takes it so is among them).
    """

    understood: Collection[str]
    harmless: Collection[str]
    off: Mapping[str, Collection[object]]


@dataclass(slots=True, frozen=True)
class ConfigReader:
    """Reads keys of one config; every method raises InvalidArgument for a value of another type."""

    config: Mapping[str, object]

    def check_keys(self, known: KnownKeys) -> None:
        """Raises FailedPrecondition for an option or a task that is not served, and for a key that
        nobody here knows unless it is null."""
        task = self.config.get("task_type")
        if task not in _TASK_TYPES:
            raise FailedPrecondition(
                "adapters for this task are not served",
                field=_field("task_type"),
                found=task,
                wanted="CAUSAL_LM or null",
            )
        for key, value in self.config.items():
            if key in known.understood or key in known.harmless or key in COMMON_KEYS:
                continue
            allowed = known.off.get(key, (None,))
            if not any(type(value) is type(off) and value == off for off in allowed):
                known_word = "this option is not served" if key in known.off else "unknown option"
                raise FailedPrecondition(
                    known_word,
                    field=_field(key),
                    found=value,
                    wanted=" or ".join("null" if off is None else repr(off) for off in allowed),
                )

    def field(self, key: str) -> str:
        """The key's name in errors."""
        return _field(key)

    def whole_number(self, key: str, *, least: int, most: int) -> int:
        return whole_number(self.config.get(key), key, least=least, most=most)

    def number(self, key: str) -> float:
        return number(self.config.get(key), key)

    def boolean(self, key: str) -> bool:
        """False where the key is absent or null."""
        value = self.config.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise _wrong_type(key, value, "true or false")

    def texts(self, key: str) -> tuple[str, ...]:
        """A string or a list of strings, in its order; empty where absent, null or ""."""
        value = self.config.get(key)
        if value is None or isinstance(value, str):
            return (value,) if value else ()
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise _wrong_type(key, value, "a string or a list of strings")

    def text_or_texts(self, key: str) -> str | frozenset[str] | None:
        """A string as it is; a list of strings as a set; None where absent, null or empty."""
        texts = self.texts(key)
        if isinstance(self.config.get(key), str):
            return texts[0] if texts else None
        return frozenset(texts) or None

    def mapping(self, key: str) -> Mapping[str, object]:
        """Empty where the key is absent or null."""
        value = self.config.get(key)
        if value is None:
            return {}
        if isinstance(value, dict):
            return value
        raise _wrong_type(key, value, "an object")


def whole_number(value: object, key: str, *, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _wrong_type(key, value, f"a whole number from {least} to {most}")
    return value


def number(value: object, key: str) -> float:
    if type(value) not in (int, float) or abs(value) > 1e9:  # type: ignore[arg-type]
        raise _wrong_type(key, value, "a number of at most 1e9")
    return float(value)  # type: ignore[arg-type]


def _wrong_type(key: str, value: object, wanted: str) -> InvalidArgument:
    return InvalidArgument(
        "the config's value is wrong", field=_field(key), found=ascii(value), wanted=wanted
    )


def _field(key: str) -> str:
    return f"{CONFIG_FILE}: {key[:100]}"
