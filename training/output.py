"""The output directory: an unfinished run's checkpoints, then the finished adapter."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.adapters_store.files import CONFIG_FILE
from manylora.errors import AlreadyExists, FailedPrecondition
from manylora.training.settings import TrainSettings

if TYPE_CHECKING:
    from peft import PeftModel

_RUN_FILE = "run.json"
_NOT_THE_RUN = ("output", "name", "resume", "publish", "store", "checkpoint_steps", "device")


class Output:
    """`directory` holds `checkpoints/` while the run is unfinished, and the adapter after it."""

    def __init__(self, settings: TrainSettings) -> None:
        self.directory = settings.directory
        self.checkpoints = self.directory / "checkpoints"
        self._settings = settings

    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None: from the start. Changes nothing.

        Raises:
            AlreadyExists: there is a finished adapter.
            FailedPrecondition: there is an unfinished run, and it is another one, or `resume` is
                not set.
        """
        if (self.directory / CONFIG_FILE).exists():
            raise AlreadyExists("there is an adapter already", field="output", found=self.directory)
        last = self._last()
        if last is not None:
            self._check_same(json.loads((self.checkpoints / _RUN_FILE).read_text()))
        return last

    def begin(self) -> None:
        """Notes what run the checkpoints will be of."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.checkpoints / _RUN_FILE).write_text(json.dumps(_describe(self._settings), indent=2))

    def finish(self, model: PeftModel, base_name: str) -> None:
        """Saves the adapter, naming the base without a path of this machine, and drops the
        checkpoints. adapter_config.json comes last: with it, the adapter is complete."""
        base = model.get_base_model()
        base.name_or_path = base.config.name_or_path = base_name
        model.peft_config["default"].base_model_name_or_path = base_name
        aside = self.checkpoints / "finished"
        # the base's own embeddings are never trained, so they are never part of the adapter
        model.save_pretrained(aside, save_embedding_layers=False)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            path.replace(self.directory / path.name)
        shutil.rmtree(self.checkpoints)

    def _check_same(self, before: dict[str, str]) -> None:
        if not self._settings.resume:
            raise FailedPrecondition(
                "there is an unfinished run",
                field="output",
                found=self.directory,
                wanted="resume, or another directory",
            )
        for key, value in _describe(self._settings).items():
            if before.get(key) != value:
                raise FailedPrecondition(
                    "the unfinished run was started with another value",
                    field=key,
                    found=value,
                    wanted=before.get(key, ""),
                )

    def _last(self) -> Path | None:
        """The newest complete checkpoint: the Trainer writes its state file last."""
        done = (path.parent for path in self.checkpoints.glob("checkpoint-*/trainer_state.json"))
        return max(done, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _describe(settings: TrainSettings) -> dict[str, str]:
    """What must be the same for a run to go on: settings, and the rows' digests."""
    run = {k: str(v) for k, v in asdict(settings).items() if k not in _NOT_THE_RUN}
    run["data"] = hashlib.sha256(settings.data.read_bytes()).hexdigest()
    if settings.validation is not None:
        run["validation"] = hashlib.sha256(settings.validation.read_bytes()).hexdigest()
    return run
