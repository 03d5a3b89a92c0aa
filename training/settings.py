"""Everything `manylora train` can be told, each with its default and its help in one place.

A field's help is its annotation: `typing.get_type_hints(TrainSettings, include_extras=True)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from manylora.adapters_store.names import AdapterName
from manylora.errors import InvalidArgument

ALL_LINEAR = "all-linear"


@dataclass(slots=True, frozen=True, kw_only=True)
class TrainSettings:
    """One training run. Wrong values raise InvalidArgument with the field's name."""

    base: Annotated[str, "Base model: a Hugging Face checkpoint's directory, or a hub name."]
    data: Annotated[Path, "JSONL rows: {prompt, completion} or {messages: [{role, content}, …]}."]
    name: Annotated[str, "The adapter's name, tenant/adapter."]
    output: Annotated[Path | None, "New directory for the adapter; default: adapters/NAME."] = None

    rank: Annotated[int, "LoRA rank."] = 16
    alpha: Annotated[float, "LoRA alpha: the update is scaled by alpha / rank."] = 32.0
    target_modules: Annotated[str, "Modules, as q_proj,v_proj, or all-linear."] = ALL_LINEAR
    dropout: Annotated[float, "Dropout on the adapter's input."] = 0.0
    rslora: Annotated[bool, "Scale by alpha / sqrt(rank) instead (rsLoRA)."] = False

    learning_rate: Annotated[float, "Peak learning rate; warms up, then falls to 0."] = 2e-4
    warmup: Annotated[float, "Share of the steps that warm up."] = 0.05
    epochs: Annotated[float, "Passes over the rows."] = 3.0
    batch_size: Annotated[int, "Rows in a step."] = 8
    max_length: Annotated[int, "Most tokens in a row; a longer row is an error."] = 1024
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        "The frozen base's data type; auto: bfloat16 where the hardware has it. "
        "The adapter is always trained and saved in float32.",
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], "Where to train; auto: a GPU if any."] = (
        "auto"
    )
    seed: Annotated[int, "Seeds the adapter's start, the order of the rows, and dropout."] = 0

    validation: Annotated[Path | None, "JSONL rows to measure the loss on, not to learn."] = None
    validation_fraction: Annotated[
        float, "Without a validation file: the share of the rows held out for it."
    ] = 0.0
    checkpoint_steps: Annotated[int, "Steps between checkpoints; 0: one for each epoch."] = 0
    resume: Annotated[bool, "Go on from the output's last checkpoint, if there is any."] = False
    publish: Annotated[bool, "Publish the adapter to the store when done."] = False
    store: Annotated[Path | None, "Directory of the adapter store to publish to."] = None

    def __post_init__(self) -> None:
        AdapterName.parse(self.name)
        if not self.targets:
            raise InvalidArgument("no module is named", field="target_modules")
        for name in ("rank", "batch_size", "max_length"):
            self._check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("alpha", "learning_rate", "epochs"):
            self._check(name, 0 < getattr(self, name) < float("inf"), "a number above 0")
        for name in ("dropout", "warmup", "validation_fraction"):
            self._check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self._check("checkpoint_steps", self.checkpoint_steps >= 0, "0 or more")
        self._check("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        if self.validation is not None and self.validation_fraction:
            raise InvalidArgument(
                "there is a validation file already", field="validation_fraction", wanted="one way"
            )
        if self.publish and self.store is None:
            raise InvalidArgument("nowhere to publish to", field="store", wanted="a directory")

    @property
    def directory(self) -> Path:
        """Where the adapter goes."""
        return self.output or Path("adapters") / self.name

    @property
    def targets(self) -> str | list[str]:
        """`target_modules` as peft takes it."""
        if self.target_modules == ALL_LINEAR:
            return ALL_LINEAR
        return [name for part in self.target_modules.split(",") if (name := part.strip())]

    def _check(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise InvalidArgument(
                "not accepted", field=name, found=getattr(self, name), wanted=wanted
            )
