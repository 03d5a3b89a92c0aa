"""Ranks and factors that a config gives by module: `r` and `rank_pattern`, `alpha` and its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from manylora.adapters_store.lowering.config_reader import ConfigReader, number, whole_number
from manylora.adapters_store.lowering.patterns import Matcher

Value = TypeVar("Value")


@dataclass(slots=True, frozen=True)
class ByModule(Generic[Value]):
    """One value for all modules, and others for those that a pattern matches."""

    default: Value
    patterns: Mapping[str, Value]
    key: str
    matcher: Matcher

    def of(self, module: str) -> Value:
        """peft's `get_pattern_key`: the first that matches the name's end, else the name."""
        for pattern, value in self.patterns.items():
            if self.matcher.match(rf"(.*\.)?({pattern})$", module, self.key) is not None:
                return value
        return self.patterns.get(module, self.default)


def read_ranks(reader: ConfigReader, matcher: Matcher, max_rank: int) -> ByModule[int]:
    """`r` and `rank_pattern`."""
    return _read(
        "rank_pattern",
        reader.whole_number("r", least=1, most=max_rank),
        lambda value, key: whole_number(value, key, least=1, most=max_rank),
        reader,
        matcher,
    )


def read_alphas(reader: ConfigReader, matcher: Matcher, key: str) -> ByModule[float]:
    """The config's `key` and `alpha_pattern`."""
    return _read("alpha_pattern", reader.number(key), number, reader, matcher)


def _read(
    key: str,
    default: Value,
    read: Callable[[object, str], Value],
    reader: ConfigReader,
    matcher: Matcher,
) -> ByModule[Value]:
    patterns = {name: read(value, key) for name, value in reader.mapping(key).items()}
    return ByModule(default, patterns, key, matcher)
