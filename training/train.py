"""Trains one LoRA adapter with peft and transformers' Trainer, and saves it as peft does."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

import torch
from rich.console import Console

from manylora.adapters_store.adapter_version import AdapterVersion
from manylora.adapters_store.store import Store
from manylora.errors import InvalidArgument, MissingExtra
from manylora.training.base import Base, load_base
from manylora.training.batches import collate, row_order
from manylora.training.encode import IGNORED, Encoder, Example
from manylora.training.output import Output
from manylora.training.rows import Row, read_rows
from manylora.training.settings import TrainSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Trainer, TrainingArguments


@dataclass(slots=True, frozen=True)
class TrainResult:
    """What a run made."""

    directory: Path  # adapter_config.json, adapter_model.safetensors, README.md
    steps: int
    trained_parameters: int
    loss: float  # mean over the run's steps, of the tokens to be learned
    validation_loss: float | None
    seconds: float
    version: AdapterVersion | None  # None: not published


def train(settings: TrainSettings, console: Console | None = None) -> TrainResult:
    """Trains an adapter as the settings say; progress goes to the console (default: stderr).

    An interrupted run leaves checkpoints in the output directory; with `resume` the next one goes
    on from the last, and ends with the weights that an uninterrupted run ends with.

    Raises:
        MissingExtra: peft or accelerate is not installed.
        InvalidArgument: a setting or a row is wrong, naming it.
        FailedPrecondition: the base is not fit for it, or the output directory holds another run.
        AlreadyExists: the output directory holds a finished adapter.
    """
    _require_extra()
    with catch_warnings():  # of names that peft still uses and transformers has given up
        filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        return _train(settings, console or Console(stderr=True))


def answer_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy of the answers' tokens, mean over all of them in the step; see `collate`.

    Args:
        outputs: with float logits [rows, kept, vocabulary].
        labels: int64 [rows, 1 + kept].
        num_items_in_batch: how many tokens the mean is over; None: those of this batch.
    """
    wanted = labels[:, 1:].flatten()
    learned = wanted != IGNORED
    logits = outputs.logits.flatten(0, 1)[learned].float()
    loss = torch.nn.functional.cross_entropy(logits, wanted[learned], reduction="sum")
    return loss / (learned.sum() if num_items_in_batch is None else num_items_in_batch)


def _train(settings: TrainSettings, console: Console) -> TrainResult:
    began = time.monotonic()
    rows, held_out = _split(settings)
    output = Output(settings)
    checkpoint = output.checkpoint()
    base = load_base(settings)
    encoder = Encoder(base.tokenizer, base.end_ids)
    examples = encoder.encode_all(rows, settings.max_length)
    validation = encoder.encode_all(held_out, settings.max_length)
    torch.manual_seed(settings.seed)
    model = _adapt(base, settings)
    trainer = _trainer(settings, base, model, output, examples, validation)
    output.begin()
    loss = _run(trainer, settings, checkpoint, console)
    validation_loss = trainer.evaluate()["eval_loss"] if validation else None
    output.finish(model, base.name)
    return TrainResult(
        directory=output.directory,
        steps=trainer.state.global_step,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        loss=loss,
        validation_loss=validation_loss,
        seconds=time.monotonic() - began,
        version=_publish(settings, output.directory),
    )


def _require_extra() -> None:
    try:
        import accelerate  # noqa: F401, PLC0415
        import peft  # noqa: F401, PLC0415
    except ImportError as error:
        raise MissingExtra(
            f"training needs {error.name}", wanted="pip install 'manylora[train]'"
        ) from error


def _split(settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    """Rows to learn, and rows for validation."""
    rows = read_rows(settings.data)
    if settings.validation is not None:
        return rows, read_rows(settings.validation)
    if not settings.validation_fraction:
        return rows, []
    count = max(1, round(len(rows) * settings.validation_fraction))
    if count >= len(rows):
        raise InvalidArgument(
            "too few rows to split", field="validation_fraction", found=f"{len(rows)} rows"
        )
    held_out = set(random.Random(settings.seed).sample(range(len(rows)), count))
    learned = [row for i, row in enumerate(rows) if i not in held_out]
    return learned, [row for i, row in enumerate(rows) if i in held_out]


def _adapt(base: Base, settings: TrainSettings) -> PeftModel:
    from peft import LoraConfig, TaskType, get_peft_model  # noqa: PLC0415

    alpha = float(settings.alpha)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=settings.targets,
    )
    try:
        return get_peft_model(base.model, config)
    except ValueError as error:
        raise InvalidArgument(
            "peft cannot adapt these modules of the base",
            field="target_modules",
            found=settings.target_modules,
            wanted=str(error),
        ) from error


def _trainer(
    settings: TrainSettings,
    base: Base,
    model: PeftModel,
    output: Output,
    examples: Sequence[Example],
    validation: Sequence[Example],
) -> Trainer:
    from transformers import PrinterCallback, Trainer  # noqa: PLC0415

    lengths = [len(example.input_ids) for example in examples]
    order = row_order(lengths, settings.epochs, settings.batch_size, settings.seed)
    epoch_steps = math.ceil(len(examples) / settings.batch_size)
    trainer = Trainer(
        model=model,
        args=_arguments(settings, output.checkpoints, epoch_steps, bool(validation)),
        train_dataset=[examples[i] for i in order],
        eval_dataset=list(validation) or None,
        data_collator=partial(collate, pad_id=base.pad_id),
        compute_loss_func=answer_loss,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(
    settings: TrainSettings, checkpoints: Path, epoch_steps: int, validate: bool
) -> TrainingArguments:
    from transformers import TrainingArguments  # noqa: PLC0415

    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,  # row_order has laid out all epochs
        train_sampling_strategy="sequential",
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=0.0,
        optim="adamw_torch",
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        eval_strategy="steps" if validate else "no",
        eval_steps=epoch_steps,
        prediction_loss_only=True,
        save_steps=settings.checkpoint_steps or epoch_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
    )


def _run(
    trainer: Trainer, settings: TrainSettings, checkpoint: Path | None, console: Console
) -> float:
    from manylora.training.progress import TrainProgress  # noqa: PLC0415

    with TrainProgress(f"training {settings.name}", console) as progress:
        trainer.add_callback(progress)
        done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return float(done.training_loss)


def _publish(settings: TrainSettings, directory: Path) -> AdapterVersion | None:
    if not settings.publish or settings.store is None:
        return None
    store = Store(settings.store)
    try:
        return store.publish(settings.name, directory)
    finally:
        store.close()
