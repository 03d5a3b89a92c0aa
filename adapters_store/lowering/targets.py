"""Which modules of the base a config targets: peft's own rule.

peft 0.21.2, `tuners_utils.check_target_module_exists` and `_maybe_include_all_linear_layers`.
Names are the modules' full names in the base's tree, "model.layers.0.self_attn.q_proj".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from manylora.adapters_store.edits import ModuleKind
from manylora.adapters_store.files import CONFIG_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, whole_number
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.errors import InvalidArgument

TARGET_KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

_ALL_LINEAR = "all-linear"
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_MAX_LAYERS = 1 << 20


@dataclass(slots=True, frozen=True)
class Targets:
    """A string is a regular expression over the whole name; a set holds names or their ends."""

    modules: str | frozenset[str]
    exclude: str | frozenset[str] | None
    layers: frozenset[int] | None
    layer_patterns: tuple[str, ...]
    matcher: Matcher

    @property
    def all_linear(self) -> bool:
        return isinstance(self.modules, str) and self.modules.lower() == _ALL_LINEAR

    def match(self, name: str, kind: ModuleKind | None = None) -> bool:
        """Whether the config targets the module.

        'all-linear' goes by the module's kind, and leaves out the output layer, which in every
        causal LM of transformers stands alone at the top of the tree; without a base (kind None)
        it takes every name.
        """
        if self._excluded(name):
            return False
        if self.all_linear:
            return kind not in (ModuleKind.EMBEDDING, ModuleKind.NORM) and (
                kind is None or "." in name
            )
        if isinstance(self.modules, str):
            return self.matcher.fullmatch(self.modules, name, "target_modules")
        if name in self.modules:
            return True
        return _ends_with_any(name, self.modules) and self._in_layers(name)

    def _excluded(self, name: str) -> bool:
        if isinstance(self.exclude, str):
            return self.matcher.fullmatch(self.exclude, name, "exclude_modules")
        return self.exclude is not None and (
            name in self.exclude or _ends_with_any(name, self.exclude)
        )

    def _in_layers(self, name: str) -> bool:
        if self.layers is None:
            return True
        index = self._layer_index(name)
        return index is not None and int(index) in self.layers

    def _layer_index(self, name: str) -> str | None:
        if not self.layer_patterns:
            match = _ANY_LAYER.match(name)
            return match["idx"] if match else None
        for pattern in self.layer_patterns:
            full = rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
            groups = self.matcher.match(full, name, "layers_pattern")
            if groups is not None:
                return groups["idx"]
        return None


def read_targets(reader: ConfigReader, matcher: Matcher) -> Targets:
    """Raises InvalidArgument for what peft itself would refuse, and for null target_modules:
    peft then picks targets by the base's type when it trains, and saves what it picked."""
    modules = reader.text_or_texts("target_modules")
    if modules is None:
        raise InvalidArgument(
            "no target modules",
            field=f"{CONFIG_FILE}: target_modules",
            wanted="the list that peft saves after training, a regular expression or all-linear",
        )
    layers = reader.config.get("layers_to_transform")
    patterns = reader.texts("layers_pattern")
    if layers is None and patterns:
        raise InvalidArgument(
            "goes only with layers_to_transform", field=f"{CONFIG_FILE}: layers_pattern"
        )
    if layers is not None and isinstance(modules, str):
        raise InvalidArgument(
            "goes only with a list of target_modules", field=f"{CONFIG_FILE}: layers_to_transform"
        )
    return Targets(
        modules=modules,
        exclude=reader.text_or_texts("exclude_modules"),
        layers=_layers(layers),
        layer_patterns=patterns,
        matcher=matcher,
    )


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    values = value if isinstance(value, list) else [value]
    return frozenset(
        whole_number(item, "layers_to_transform", least=0, most=_MAX_LAYERS) for item in values
    )


def _ends_with_any(name: str, endings: frozenset[str]) -> bool:
    """Whether the name ends with '.' and one of the endings."""
    dot = name.find(".")
    while dot >= 0:
        if name[dot + 1 :] in endings:
            return True
        dot = name.find(".", dot + 1)
    return False
