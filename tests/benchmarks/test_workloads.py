from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from manylora_testing.models import tiny_model
from workloads import (
    CHECKPOINTS,
    MIXED_RANKS,
    PROMPT_TOKENS,
    REGISTERED,
    WORKLOADS,
    adapter_folders,
    kv_bytes,
    pool_bytes,
)

from manylora.adapters_store.format import read_checkpoint


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_request_is_on_an_adapter_that_there_is(name: str) -> None:
    workload = WORKLOADS[name]
    assert len(workload.picks) == workload.requests
    assert all(-1 <= pick < len(workload.ranks) for pick in workload.picks)


def test_distinct_means_distinct() -> None:
    assert sorted(WORKLOADS["distinct-32"].picks) == list(range(32))
    assert Counter(WORKLOADS["mixed-rank-32"].ranks) == dict.fromkeys(MIXED_RANKS, 8)


def test_popularity_falls_as_zipf_says() -> None:
    picks = WORKLOADS["zipf-128"].picks
    assert picks == WORKLOADS["zipf-128-roomy"].picks
    counts = Counter(picks)
    assert counts[0] == max(counts.values())
    assert sum(counts[k] for k in range(8)) > len(picks) / 3


def test_more_registered_adapters_are_more_different_ones() -> None:
    used = [len(set(WORKLOADS[f"registered-{n}"].picks)) for n in REGISTERED]
    assert all(fewer < more for fewer, more in pairwise(used))


def test_prompts_are_the_same_each_time() -> None:
    prompts = WORKLOADS["base-32"].prompts(1000)
    assert prompts == WORKLOADS["base-32"].prompts(1000)
    assert {len(prompt) for prompt in prompts} == {PROMPT_TOKENS}
    assert all(3 <= token < 1000 for prompt in prompts for token in prompt)


def test_adapters_are_made_once_in_the_served_format(tmp_path: Path) -> None:
    model = tmp_path / "base"
    tiny_model("llama", model)
    folders = adapter_folders((4, 8), model, tmp_path)
    made = [(folder / "adapter_model.safetensors").stat().st_mtime_ns for folder in folders]
    assert adapter_folders((4, 8), model, tmp_path) == folders
    assert made == [(f / "adapter_model.safetensors").stat().st_mtime_ns for f in folders]
    for rank, folder in zip((4, 8), folders, strict=True):
        assert read_checkpoint(folder).config["r"] == rank


def test_many_adapters_share_files(tmp_path: Path) -> None:
    model = tmp_path / "base"
    tiny_model("llama", model)
    folders = adapter_folders((1,) * (CHECKPOINTS + 1), model, tmp_path)
    assert len(set(folders)) == CHECKPOINTS
    assert folders[0] == folders[-1]


def test_memory_is_for_the_largest(tmp_path: Path) -> None:
    sizes = (10_000_000, 30_000_000, 20_000_000)
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        with (tmp_path / str(size) / "adapter_model.safetensors").open("wb") as file:
            file.truncate(size)
    folders = [tmp_path / str(size) for size in sizes]
    assert 50_000_000 <= pool_bytes(folders, 2) < 60_000_000


def test_kv_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,'
        ' "num_hidden_layers": 30}'
    )
    assert kv_bytes(tmp_path, 10) == 10 * 2 * 3 * 64 * 2 * 30
