"""Which modules, and at which rank, held against peft's own functions."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manylora.adapters_store.edits import ModuleKind
from manylora.adapters_store.lowering.config_reader import ConfigReader
from manylora.adapters_store.lowering.lora import _read
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.targets import read_targets
from manylora.errors import InvalidArgument

MODULES = [
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    *(
        f"model.layers.{layer}.{module}"
        for layer in (0, 1, 11)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.1.w1")
    ),
    "transformer.h.1.attn.c_attn",
    "0.proj",
]
ENDINGS = ["q_proj", "proj", "self_attn.q_proj", "layers.1.mlp.up_proj", "w1", "1.w1", "c_attn"]
REGEXES = [
    r".*\.q_proj",
    r"model\.layers\.\d\..*(k|q)_proj",
    r".*layers.1.*",
    "q_proj",
    r"(?!.*mlp).*proj$",
    r"(?i).*Q_PROJ",
    r"^model.*[a-k]_proj",
    "",
]


def agree(config: dict[str, Any]) -> None:
    try:
        theirs = peft.LoraConfig(**config)
    except (ValueError, re.error):
        assume(False)
    ours = read_targets(ConfigReader(config), Matcher())
    for name in MODULES:
        assert ours.match(name) == bool(check_target_module_exists(theirs, name)), name


names = st.one_of(st.sampled_from(MODULES), st.sampled_from(ENDINGS))


@settings(max_examples=200, deadline=None)
@given(
    target_modules=st.lists(names, min_size=1, max_size=4),
    exclude_modules=st.one_of(
        st.none(), st.lists(names, max_size=2), st.sampled_from([r".*1.*", "lm_head"])
    ),
    layers_to_transform=st.one_of(
        st.none(), st.integers(0, 11), st.lists(st.sampled_from([0, 1, 11]), max_size=2)
    ),
    layers_pattern=st.one_of(
        st.none(), st.sampled_from(["layers", "h", "experts", "layers|h", r"l\w+", ["h", "layers"]])
    ),
)
def test_lists_as_peft_reads_them(**config: Any) -> None:
    agree(config)


@settings(max_examples=50, deadline=None)
@given(
    target_modules=st.sampled_from([text for text in REGEXES if text]),
    exclude_modules=st.one_of(st.none(), st.sampled_from(REGEXES), st.lists(names, max_size=2)),
)
def test_regular_expressions_as_peft_reads_them(**config: Any) -> None:
    agree(config)


@settings(max_examples=200, deadline=None)
@given(
    ranks=st.dictionaries(
        st.one_of(names, st.sampled_from([*REGEXES[:4], r"^model.layers.1.mlp.up_proj", "a|w1"])),
        st.integers(1, 64),
        max_size=4,
    )
)
def test_rank_and_alpha_patterns_as_peft_reads_them(ranks: dict[str, int]) -> None:
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    reader = ConfigReader({**config, "rank_pattern": ranks, "alpha_pattern": ranks})
    ours = _read(reader, {}, max_rank=64)
    for name in MODULES:
        key = get_pattern_key(ranks.keys(), name)
        assert ours.ranks.of(name) == ranks.get(key, 8)
        assert ours.alphas.of(name) == ranks.get(key, 16)


def test_all_linear_is_case_insensitive_and_means_layers_linears() -> None:
    targets = read_targets(ConfigReader({"target_modules": "All-Linear"}), Matcher())
    found = [kind for kind in ModuleKind if targets.match("model.layers.0.module", kind)]
    assert set(found) == set(ModuleKind) - {ModuleKind.EMBEDDING, ModuleKind.NORM}
    assert not targets.match("lm_head", ModuleKind.LINEAR)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": ""},
        {"target_modules": 3},
        {"target_modules": ["q_proj", 3]},
        {"target_modules": "(unclosed"},
        {"target_modules": "a" * 9000},
        {"target_modules": r"fuzzy{e<=1}"},
        {"target_modules": r"[[:alpha:]]+"},
        {"target_modules": "q_proj", "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": ["0"]},
        {"target_modules": ["q_proj"], "layers_to_transform": True},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "("},
        {"target_modules": ["q_proj"], "exclude_modules": {"q_proj": 1}},
    ],
)
def test_bad_targets_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"adapter_config\.json: "):
        read_targets(ConfigReader(config), Matcher()).match("model.layers.0.self_attn.q_proj")


def test_a_regular_expression_that_never_ends_is_refused() -> None:
    matcher = Matcher()
    with pytest.raises(InvalidArgument, match="target_modules: the regular expression takes too"):
        matcher.fullmatch(r"(.|..|...)+\d\Z", MODULES[3], "target_modules")
