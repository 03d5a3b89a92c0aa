"""LoRA and rank-stabilised LoRA: y += scale · B (A x).

Papers: Hu et al. 2021 (arXiv:2106.09685), scale = alpha / r; Kalajdzievski 2023
(arXiv:2312.03732), scale = alpha / √r. Right is what peft 0.21.2 computes after
`PeftModel.from_pretrained` (`tuners/lora`). A is [r, in] and B [out, r] for Linear and for Conv1D
alike, so `fan_in_fan_out` changes only how peft merges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering.base_copies import BaseParameter, check_base_copies
from manylora.adapters_store.lowering.config_reader import (
    ConfigReader,
    KnownKeys,
    number,
    whole_number,
)
from manylora.adapters_store.lowering.factors import PREFIX, Factors, read_parts
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.errors import FailedPrecondition, InvalidArgument

_KEYS = KnownKeys(
    understood=(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        *TARGET_KEYS,
    ),
    harmless=(
        "lora_dropout",
        "fan_in_fan_out",
        "merge_weights",  # peft 0.1
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",  # these four are read only with their own init_lora_weights
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),
    off={
        "bias": ("none",),
        "lora_bias": (False, None),
        "use_dora": (False, None),
        "use_qalora": (False, None),
        "ensure_weight_tying": (False, None),
        "modules_to_save": (None, []),
        "layer_replication": (None, []),
        "target_parameters": (None, []),
        "megatron_config": (None, {}),
        "trainable_token_indices": (None,),
        "alora_invocation_tokens": (None,),
        "velora_config": (None,),
        "monteclora_config": (None,),
        "kasa_config": (None,),
        "arrow_config": (None,),
        "use_bdlora": (None,),
    },
)
# Inits that leave the base's weights alone when peft loads the adapter.
_SERVED_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_OTHER_INITS = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga", re.IGNORECASE)

_ANY_RANK = 1 << 30  # the limit was checked when the adapter was published


@dataclass(slots=True, frozen=True)
class _Config:
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: Targets

    def rank_of(self, module: str) -> int:
        return self.ranks.get(self._pattern(self.ranks, module, "rank_pattern"), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        alpha = self.alphas.get(self._pattern(self.alphas, module, "alpha_pattern"), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def _pattern(self, patterns: Mapping[str, object], module: str, key: str) -> str:
        """peft's `get_pattern_key`: the first that matches the name's end, else the name."""
        for pattern in patterns:
            if self.targets.matcher.match(rf"(.*\.)?({pattern})$", module, key) is not None:
                return pattern
        return module


@dataclass(slots=True, frozen=True)
class _Pair:
    """One module's low-rank edit: its tensors' names in the file, and what the config says."""

    a: str
    b: str
    rank: int
    scale: float


def check(checkpoint: Checkpoint, limits: Limits) -> int:
    """Checks all that can be checked without a base; returns the largest rank."""
    config = _read_config(checkpoint.config, limits.max_rank)
    pairs = _read_pairs(checkpoint, config, read_parts(checkpoint).factors)
    return max(pair.rank for pair in pairs.values())


def lower(
    checkpoint: Checkpoint, modules: Mapping[str, ModuleShape], parameter: BaseParameter | None
) -> LoweredAdapter:
    """One edit (a, b, scale) for each targeted module, in the file's dtypes."""
    config = _read_config(checkpoint.config, _ANY_RANK)
    parts = read_parts(checkpoint)
    pairs = _read_pairs(checkpoint, config, parts.factors)
    for module, pair in pairs.items():
        _check_fit(checkpoint, config, modules, module, pair)
    _check_complete(config, pairs, modules)
    check_base_copies(checkpoint, parts.copies, parameter)
    tensors = checkpoint.load(name for pair in pairs.values() for name in (pair.a, pair.b))
    return LoweredAdapter(
        {
            module: ModuleEdit(a=tensors[pair.a], b=tensors[pair.b], scale=pair.scale)
            for module, pair in pairs.items()
        }
    )


def _read_config(config: Mapping[str, object], max_rank: int) -> _Config:
    reader = ConfigReader(config)
    reader.check_keys(_KEYS)
    _check_init(config.get("init_lora_weights", True))
    return _Config(
        rank=reader.whole_number("r", least=1, most=max_rank),
        alpha=reader.number("lora_alpha"),
        rank_stabilised=reader.boolean("use_rslora"),
        ranks={
            key: whole_number(rank, "rank_pattern", least=1, most=max_rank)
            for key, rank in reader.mapping("rank_pattern").items()
        },
        alphas={
            key: number(alpha, "alpha_pattern")
            for key, alpha in reader.mapping("alpha_pattern").items()
        },
        targets=read_targets(reader, Matcher()),
    )


def _check_init(init: object) -> None:
    """PiSSA, OLoRA and their like subtract the initial factors from the base's weights; without
    that, their factors mean nothing."""
    name = init.lower() if isinstance(init, str) else init
    if any(type(name) is type(served) and name == served for served in _SERVED_INITS):
        return
    field = f"{CONFIG_FILE}: init_lora_weights"
    if isinstance(name, str) and _OTHER_INITS.fullmatch(name):
        raise FailedPrecondition(
            "this initialisation changes the base's weights, which all adapters here share",
            field=field,
            found=init,
            wanted="the adapter converted to plain LoRA (peft: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...))",
        )
    raise FailedPrecondition(
        "unknown initialisation", field=field, found=ascii(init), wanted="one of peft 0.21's"
    )


def _read_pairs(
    checkpoint: Checkpoint, config: _Config, factors: Mapping[str, Factors]
) -> dict[str, _Pair]:
    """Both factors are there, belong to a targeted module and have the config's rank."""
    pairs = {}
    for module, names in factors.items():
        if not names.a or not names.b:
            raise InvalidArgument(
                "lora_A and lora_B go together",
                field=f"{WEIGHTS_FILE}: {names.a or names.b}",
                wanted=f"{'lora_B' if names.a else 'lora_A'} of {module}",
            )
        if not config.targets.match(module):
            raise InvalidArgument(
                "the config does not target this module, so peft would leave the tensor out",
                field=f"{WEIGHTS_FILE}: {names.a}",
                wanted=f"a tensor of a module in {CONFIG_FILE}: target_modules",
            )
        rank = config.rank_of(module)
        _check_shape(checkpoint, names.a, (rank, None))
        _check_shape(checkpoint, names.b, (None, rank))
        pairs[module] = _Pair(names.a, names.b, rank, config.scale_of(module, rank))
    return pairs


def _check_fit(
    checkpoint: Checkpoint,
    config: _Config,
    modules: Mapping[str, ModuleShape],
    module: str,
    pair: _Pair,
) -> None:
    shape = modules.get(module)
    if shape is None or not config.targets.match(module, shape.kind):
        raise FailedPrecondition(
            "the base has no such module to adapt",
            field=f"{WEIGHTS_FILE}: {pair.a}",
            found=module,
            wanted=f"a module of the base, as {_example(modules)}",
        )
    if shape.kind is ModuleKind.EMBEDDING:
        raise FailedPrecondition(
            "the module is an embedding",
            field=f"{WEIGHTS_FILE}: {pair.a}",
            wanted="Linear or Conv1D",
        )
    _check_shape(checkpoint, pair.a, (pair.rank, shape.in_size))
    _check_shape(checkpoint, pair.b, (shape.out_size, pair.rank))


def _check_complete(
    config: _Config, pairs: Mapping[str, _Pair], modules: Mapping[str, ModuleShape]
) -> None:
    """Every module of the base that the config targets has its tensors."""
    for module, shape in modules.items():
        if module not in pairs and config.targets.match(module, shape.kind):
            raise FailedPrecondition(
                "the config targets a module that has no tensors in the file",
                field=f"{WEIGHTS_FILE}: {PREFIX}{module}.lora_A.weight",
                found="nothing",
                wanted=f"[{config.rank_of(module)}, {shape.in_size}]",
            )


def _check_shape(
    checkpoint: Checkpoint, tensor: str, wanted: tuple[int | None, int | None]
) -> None:
    """None stands for any size."""
    found = checkpoint.tensors[tensor].shape
    if len(found) != 2 or any(w is not None and f != w for f, w in zip(found, wanted, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in wanted)
        raise FailedPrecondition(
            "the tensor's shape does not fit",
            field=f"{WEIGHTS_FILE}: {tensor}",
            found=list(found),
            wanted=f"[{sizes}]",
        )


def _example(modules: Mapping[str, ModuleShape]) -> str:
    return next(iter(modules), "none")
