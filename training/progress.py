"""The Trainer's progress as one rich line: steps, loss, time left."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainProgress(TrainerCallback):  # type: ignore[misc]
    """Shows a bar on the console while training runs."""

    def __init__(self, description: str, console: Console) -> None:
        self._description = description
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = TaskID(0)

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the base's signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: object,
    ) -> None:
        self._task = self._progress.add_task(
            self._description, total=state.max_steps, completed=state.global_step, loss=""
        )

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: object,
    ) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        for key, word in (("loss", "loss"), ("eval_loss", "validation loss")):
            if logs and key in logs:
                self._progress.update(self._task, loss=f"{word} {logs[key]:.3f}")
