from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from manylora.adapters_store.store import Store
from manylora.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    ManyloraError,
    MissingExtra,
)
from manylora.training import TrainResult, TrainSettings
from manylora.training import train as run
from manylora.training.batches import collate
from manylora.training.encode import Encoder
from manylora.training.progress import TrainProgress
from manylora.training.rows import read_rows
from manylora.training.train import answer_loss

Make = Callable[..., TrainSettings]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def train(settings: TrainSettings) -> TrainResult:
    return run(settings, Console(quiet=True))


def loss_on(base: Path, adapter: Path | None, data: Path) -> float:
    """The loss on all rows, with the base and the adapter as peft loads them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    encoder = Encoder(AutoTokenizer.from_pretrained(base), [])
    batch = collate(encoder.encode_all(read_rows(data), 512), pad_id=0)
    labels = batch.pop("labels")
    with torch.no_grad():
        return float(answer_loss(model(**batch), labels))


def test_training_lowers_the_loss_of_the_saved_adapter(
    settings: Make, base: Path, data: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"  # one batch
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:4]))
    result = train(settings(validation=few))
    before, after = loss_on(base, None, data), loss_on(base, result.directory, data)
    assert after < before / 2
    assert result.validation_loss == pytest.approx(loss_on(base, result.directory, few), rel=1e-4)
    assert result.steps == 16  # 3 × 21 rows, 4 in a step
    assert after < result.loss < before
    assert result.trained_parameters == sum(
        tensor.numel() for tensor in load_file(result.directory / WEIGHTS).values()
    )


def test_files_are_what_save_pretrained_writes(settings: Make, base: Path, tmp_path: Path) -> None:
    chosen = settings(target_modules="q_proj, down_proj", rslora=True, dropout=0.1, epochs=0.2)
    directory = train(chosen).directory
    assert {path.name for path in directory.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    again = tmp_path / "again"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, directory)
    model.save_pretrained(again, save_embedding_layers=False)
    assert (again / WEIGHTS).read_bytes() == (directory / WEIGHTS).read_bytes()
    ours = json.loads((directory / CONFIG).read_text())
    theirs = json.loads((again / CONFIG).read_text())
    ours["target_modules"].sort()
    theirs["target_modules"].sort()
    assert ours == theirs
    assert (ours["r"], ours["lora_alpha"], ours["use_rslora"]) == (4, 8, True)
    assert ours["target_modules"] == ["down_proj", "q_proj"]


def test_no_file_names_a_path_of_this_machine(settings: Make, base: Path, tmp_path: Path) -> None:
    directory = train(settings(epochs=0.2)).directory
    for path in directory.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(base.parent).encode() not in path.read_bytes()
    config = json.loads((directory / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"


def test_a_bfloat16_base_gets_a_float32_adapter(settings: Make) -> None:
    directory = train(settings(dtype="bfloat16", epochs=0.2)).directory
    assert {tensor.dtype for tensor in load_file(directory / WEIGHTS).values()} == {torch.float32}


def test_the_seed_decides(settings: Make, tmp_path: Path) -> None:
    weights = [
        load_file(
            train(settings(seed=seed, epochs=0.5, output=tmp_path / name)).directory / WEIGHTS
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


class Interruption(BaseException):
    pass


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainSettings], None]:
    """Runs until its seventh step and breaks off, as on Ctrl-C."""

    def break_off(settings: TrainSettings) -> None:
        def on_step_end(
            _self: object, _args: object, state: TrainerState, *_a: object, **_k: object
        ) -> None:
            if state.global_step == 7:
                raise Interruption

        with monkeypatch.context() as patch:
            patch.setattr(TrainProgress, "on_step_end", on_step_end)
            with pytest.raises(Interruption):
                train(settings)

    return break_off


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    settings: Make, interrupt: Callable[[TrainSettings], None], tmp_path: Path
) -> None:
    whole = settings(dropout=0.2, checkpoint_steps=5, output=tmp_path / "whole")
    broken = settings(dropout=0.2, checkpoint_steps=5, output=tmp_path / "broken", resume=True)
    interrupt(broken)
    assert not (tmp_path / "broken" / CONFIG).exists()
    resumed = train(broken)
    assert resumed.steps == train(whole).steps
    assert (tmp_path / "broken" / WEIGHTS).read_bytes() == (
        tmp_path / "whole" / WEIGHTS
    ).read_bytes()
    assert not (tmp_path / "broken" / "checkpoints").exists()


def test_an_unfinished_run_is_not_mixed_with_another(
    settings: Make, interrupt: Callable[[TrainSettings], None], data: Path
) -> None:
    interrupt(settings(checkpoint_steps=5))
    with pytest.raises(FailedPrecondition, match="unfinished run"):
        train(settings(checkpoint_steps=5))
    with pytest.raises(FailedPrecondition) as caught:
        train(settings(resume=True, rank=8))
    assert caught.value.field == "rank"
    data.write_text(data.read_text().replace("red", "pink"))
    with pytest.raises(FailedPrecondition) as caught:
        train(settings(resume=True))
    assert caught.value.field == "data"


def test_a_finished_adapter_is_not_overwritten(settings: Make) -> None:
    directory = train(settings(epochs=0.2)).directory
    before = (directory / WEIGHTS).read_bytes()
    with pytest.raises(AlreadyExists):
        train(settings(epochs=0.2, seed=5, resume=True))
    assert (directory / WEIGHTS).read_bytes() == before


def test_publishing_ends_in_the_store(settings: Make, tmp_path: Path) -> None:
    result = train(settings(epochs=0.2, publish=True, store=tmp_path / "store"))
    store = Store(tmp_path / "store")
    try:
        version = store.resolve("acme/colours")
        assert version == result.version
        stored = store.open_object(version.digest)
        assert (stored / WEIGHTS).read_bytes() == (result.directory / WEIGHTS).read_bytes()
    finally:
        store.close()


def test_a_fraction_is_held_out(settings: Make) -> None:
    result = train(settings(validation_fraction=0.25, epochs=1.0))
    assert result.steps == 4  # 16 of 21 rows
    assert result.validation_loss is not None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "acme"}, "name"),
        ({"name": "Acme/../x"}, "name (tenant)"),
        ({"rank": 0}, "rank"),
        ({"alpha": float("nan")}, "alpha"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"epochs": 0.0}, "epochs"),
        ({"batch_size": -1}, "batch_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"validation_fraction": 0.1, "validation": Path("x")}, "validation_fraction"),
        ({"target_modules": " , "}, "target_modules"),
        ({"publish": True}, "store"),
        ({"seed": -1}, "seed"),
        ({"target_modules": "w_proj"}, "target_modules"),
        ({"base": "/nonexistent"}, "base"),
        ({"validation_fraction": 0.99}, "validation_fraction"),
        ({"max_length": 8}, "rows.jsonl:1"),
    ],
)
def test_a_wrong_setting_is_named(settings: Make, changes: dict[str, object], field: str) -> None:
    with pytest.raises(ManyloraError) as caught:
        train(settings(**changes))
    assert isinstance(caught.value, InvalidArgument | FailedPrecondition)
    assert caught.value.field == field


def test_a_wrong_setting_leaves_nothing_behind(settings: Make, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        train(settings(max_length=8))
    assert not (tmp_path / "adapter").exists()


def test_a_missing_package_is_named(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"manylora\[train\]"):
        train(settings())


def test_progress_tells_steps_and_loss(settings: Make, tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as file:
        run(settings(epochs=0.2), Console(file=file, width=120))
    shown = (tmp_path / "shown").read_text()
    assert "training acme/colours" in shown
    assert "1/1" in shown
    assert "loss" in shown
