"""Heads of adapters for other tasks: taken apart from the rest, or refused with what is wrong."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from manylora.adapters_store.format import Checkpoint, read_checkpoint
from manylora.adapters_store.head import Head, Problem, Task
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering import check_config, lower
from manylora.adapters_store.lowering.heads import check_pooler, split_head
from manylora.errors import FailedPrecondition, InvalidArgument, ManyloraError

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RoBERTa's classifier of three labels: two layers of its own."""
    directory = tmp_path_factory.mktemp("saved")
    base = hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, num_labels=3))
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(directory)
    return directory


def changed(
    saved: Path,
    directory: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor | None] | None = None,
) -> Checkpoint:
    """The checkpoint with keys and tensors added, replaced, or (None) left out."""
    keys = {**json.loads((saved / "adapter_config.json").read_text()), **(config or {})}
    weights = {**load_file(saved / "adapter_model.safetensors"), **(tensors or {})}
    (directory / "adapter_config.json").write_text(json.dumps(keys))
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, directory / "adapter_model.safetensors")
    return read_checkpoint(directory)


def head_of(checkpoint: Checkpoint) -> Head:
    _, head = split_head(checkpoint)
    assert head is not None
    return head


def test_what_peft_saves_is_a_head_and_an_adapter(saved: Path) -> None:
    checkpoint = read_checkpoint(saved)
    rest, head = split_head(checkpoint)
    weights = load_file(saved / "adapter_model.safetensors")
    assert head is not None and head.task is Task.SEQ_CLS
    assert list(head.layers) == ["classifier.dense", "classifier.out_proj"]
    for name, layer in head.layers.items():
        assert layer.bias is not None
        assert torch.equal(layer.weight, weights[f"base_model.model.{name}.weight"])
        assert torch.equal(layer.bias, weights[f"base_model.model.{name}.bias"])
    assert (head.labels, head.problem) == ((), None)
    assert set(rest.tensors) == {name for name in weights if ".lora_" in name}
    assert (rest.config["task_type"], rest.config["modules_to_save"]) == (None, None)
    assert check_config(checkpoint, Limits()) == 2
    loaded = rest.load(rest.tensors)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


def test_old_names_of_the_same(saved: Path, tmp_path: Path) -> None:
    """With `modules_to_save` and the adapter's name inside, as in a model's whole state."""
    weights = load_file(saved / "adapter_model.safetensors")
    moves: dict[str, torch.Tensor | None] = {}
    for name, tensor in weights.items():
        if ".classifier." in name:
            moves[name] = None
            inside = ".classifier.modules_to_save.default."
            moves[name.replace(".classifier.", inside)] = tensor
    assert list(head_of(changed(saved, tmp_path, tensors=moves)).layers) == [
        "classifier.dense",
        "classifier.out_proj",
    ]


def test_labels_and_problem(saved: Path, tmp_path: Path) -> None:
    names = {"0": "calm", "1": "angry", "2": "ünclear"}
    config = {"id2label": names, "problem_type": "multi_label_classification"}
    checkpoint = changed(saved, tmp_path, {**config, "label2id": {"calm": 0}})
    head = head_of(checkpoint)
    assert (head.labels, head.problem) == (("calm", "angry", "ünclear"), Problem.MULTI_LABEL)
    assert check_config(checkpoint, Limits()) == 2


BAD: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "two labels of three": ({"id2label": {"0": "a", "1": "b"}}, {}, "id2label"),
    "a label's number twice": ({"id2label": {"0": "a", "1": "b", "01": "c"}}, {}, "id2label"),
    "a number for a label": ({"id2label": {"0": "a", "1": "b", "2": 3}}, {}, "id2label"),
    "a long label": ({"id2label": {"0": "a", "1": "b", "2": "c" * 999}}, {}, "id2label"),
    "labels in a list": ({"id2label": ["a", "b", "c"]}, {}, "id2label"),
    "no such problem": ({"problem_type": "guessing"}, {}, "problem_type"),
    "a weight of one dimension": (
        {},
        {"base_model.model.classifier.out_proj.weight": torch.ones(3)},
        "out_proj",
    ),
    "a bias of another size": (
        {},
        {"base_model.model.classifier.out_proj.bias": torch.ones(4)},
        "out_proj.bias",
    ),
    "one weight under two names": (
        {},
        {"base_model.model.classifier.modules_to_save.default.out_proj.weight": torch.ones(3, 16)},
        "out_proj.weight",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_heads_are_refused(case: str, saved: Path, tmp_path: Path) -> None:
    config, tensors, name = BAD[case]
    with pytest.raises(InvalidArgument) as caught:
        check_config(changed(saved, tmp_path, config, tensors), Limits())
    assert name in caught.value.field


def test_no_head_means_the_bases_own(saved: Path, tmp_path: Path) -> None:
    parts = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    gone = dict.fromkeys(f"base_model.model.classifier.{part}" for part in parts)
    names = {"id2label": {"0": "calm", "1": "angry"}}
    head = head_of(changed(saved, tmp_path, names, dict(gone)))
    assert not head.layers
    assert head.labels == ("calm", "angry")


def test_a_bias_that_peft_writes_twice(saved: Path, tmp_path: Path) -> None:
    """As with `bias="all"`, beside the base's own, which it never uses."""
    prefix, bias = "base_model.model.classifier", "dense.bias"
    again, own = head_of(read_checkpoint(saved)).layers["classifier.dense"].bias, torch.ones(16)
    assert again is not None
    twice = {f"{prefix}.modules_to_save.default.{bias}": again}
    originals = {f"{prefix}.original_module.{bias}": own}
    rest, head = split_head(changed(saved, tmp_path, tensors={**twice, **originals}))
    assert not [name for name in rest.tensors if "classifier" in name]
    assert head is not None
    found = head.layers["classifier.dense"].bias
    assert found is not None and torch.equal(found, again)
    with pytest.raises(InvalidArgument, match="differ"):
        split_head(changed(saved, tmp_path, tensors=dict.fromkeys(twice, own)))


@pytest.mark.parametrize("task", ["QUESTION_ANS", "SEQ_2_SEQ_LM", "NOT_A_TASK", 3])
def test_other_tasks_are_refused_by_name(saved: Path, tmp_path: Path, task: object) -> None:
    checkpoint = changed(saved, tmp_path, {"task_type": task})
    for refuse in (lambda: check_config(checkpoint, Limits()), lambda: lower(checkpoint, {})):
        with pytest.raises(FailedPrecondition) as caught:
            refuse()
        assert "task_type" in caught.value.field and str(task) in (caught.value.found or "")


def test_saved_modules_that_are_no_head_stay_with_the_adapter(saved: Path, tmp_path: Path) -> None:
    names = ["classifier", "embeddings", "score"]
    rest, _ = split_head(changed(saved, tmp_path, {"modules_to_save": names}))
    assert rest.config["modules_to_save"] == ["embeddings"]


def test_a_poolers_tensors_do_not_matter_to_hidden_rows(tmp_path: Path) -> None:
    base = hf.RobertaModel(hf.RobertaConfig(**SIZES))
    config = peft.LoraConfig(r=2, target_modules=["dense"], task_type="FEATURE_EXTRACTION")
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    rest, head = split_head(checkpoint)
    assert head is not None and (head.task, head.layers) == (Task.FEATURE_EXTRACTION, {})
    left = set(checkpoint.tensors) - set(rest.tensors)
    assert left and all(".pooler." in name for name in left)


@pytest.mark.parametrize("kind", [peft.UniLoraConfig, peft.TinyLoraConfig])
def test_a_pooler_that_changes_what_others_get(kind: Any, tmp_path: Path) -> None:
    for targets, served in ((["query", "value"], True), (["query", "dense"], False)):
        base = hf.RobertaModel(hf.RobertaConfig(**SIZES))
        config = kind(target_modules=targets, task_type="FEATURE_EXTRACTION")
        peft.get_peft_model(base, config).save_pretrained(tmp_path)
        with nullcontext() if served else pytest.raises(FailedPrecondition, match=r"pooler\.dense"):
            check_pooler(read_checkpoint(tmp_path).config)


def test_errors_are_ours(saved: Path, tmp_path: Path) -> None:
    checkpoint = changed(saved, tmp_path, {"modules_to_save": {"classifier": True}})
    with pytest.raises(ManyloraError, match="modules_to_save"):
        split_head(checkpoint)
