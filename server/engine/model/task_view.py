"""The base as peft saw it when an adapter was made: each task has its own tree of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedConfig

from manylora.adapters_store.edits import LoweredAdapter, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.head import Head, Problem, Task
from manylora.adapters_store.lowering import check_pooler, lower, read_task
from manylora.errors import FailedPrecondition
from manylora.server.engine.model.heads import HeadForm
from manylora.server.engine.model.step import StepState
from manylora.server.engine.types import Rows


@dataclass(slots=True, frozen=True)
class TaskView:
    """modules: what an adapter of the task may edit, by its name in the task's tree. prefix: what
    our tree's names have before these. form: the task's head; None if it has none."""

    modules: Mapping[str, ModuleShape]
    prefix: str
    form: HeadForm | None


@dataclass(slots=True, frozen=True)
class TaskBase:
    """What the base is to requests that want no text.

    pad_token_id: that classifiers look for, or None. labels, problem: of the base's own config,
    for heads that do not say. embedding: the rows of an embedding where the request does not say.
    head: the base's own, of an encoder that was trained to classify. has_pooler: whether
    transformers puts one behind the base without a head, where peft may adapt it.
    """

    views: Mapping[Task, TaskView]
    pad_token_id: int | None
    labels: tuple[str, ...]
    problem: Problem | None
    embedding: Rows
    has_pooler: bool
    head: Head | None = None


class PooledModel(Protocol):
    """The part of a model that requests without text need."""

    @property
    def tasks(self) -> TaskBase: ...

    @property
    def step(self) -> StepState: ...

    def run_stems(self, jobs: Sequence[tuple[Task | None, int, Tensor]]) -> list[Tensor]:
        """What the base itself puts before a head, by task and slot: [k, hidden] for [k, hidden];
        task None: an embedding, left as it is."""


def read_task_base(
    config: PreTrainedConfig, views: Mapping[Task, TaskView], embedding: Rows
) -> TaskBase:
    """config: the model's."""
    problem = getattr(config, "problem_type", None)
    return TaskBase(
        views=views,
        pad_token_id=getattr(config.get_text_config(), "pad_token_id", None),
        labels=tuple(str(config.id2label[i]) for i in sorted(config.id2label or {})),
        problem=None if problem is None else Problem(problem),
        embedding=embedding,
        has_pooler=Task.CAUSAL_LM not in views and config.model_type != "modernbert",
    )


def make_views(
    modules: Mapping[str, ModuleShape],
    base_prefix: str,
    forms: Mapping[Task, HeadForm],
    *,
    generates: bool,
) -> Mapping[Task, TaskView]:
    """modules: all of our tree. base_prefix: its name of the base without any head. forms: of the
    classifiers. generates: whether it is a causal language model's tree."""
    dotted = f"{base_prefix}."
    stems = tuple(f"{form.stem}." for form in forms.values() if form.stem)
    inside = {
        name: shape
        for name, shape in modules.items()
        if name.startswith(dotted) and not name.startswith(stems)
    }
    bare = {name.removeprefix(dotted): shape for name, shape in inside.items()}
    views = {Task.FEATURE_EXTRACTION: TaskView(bare, dotted, None)}
    if generates:
        views[Task.CAUSAL_LM] = TaskView(modules, "", None)
    for task, form in forms.items():
        stem = {n: s for n, s in modules.items() if form.stem and n.startswith(f"{form.stem}.")}
        views[task] = TaskView({**inside, **stem}, "", form)
    return views


def lower_for(
    checkpoint: Checkpoint, base: TaskBase, parameter: Callable[[str], Tensor | None]
) -> LoweredAdapter:
    """The adapter's edits by the names of our tree, and its head, all fitting the base.

    parameter: of our tree. Raises FailedPrecondition for a task that the base does not serve, and
    what `lower` raises.
    """
    views = base.views
    if checkpoint.config.get("task_type") is None and Task.CAUSAL_LM not in views:
        # peft wrapped the encoder itself: with a head, its modules have other names
        config = {**checkpoint.config, "task_type": Task.FEATURE_EXTRACTION.value}
        checkpoint = replace(checkpoint, config=config)
    task = read_task(checkpoint.config)
    view = views.get(task)
    if view is None:
        raise FailedPrecondition(
            "the base does not serve adapters for this task",
            field=f"{CONFIG_FILE}: task_type",
            found=task.value,
            wanted=" or ".join(task.value for task in views),
        )
    if task is Task.FEATURE_EXTRACTION and base.has_pooler:
        check_pooler(checkpoint.config)
    prefix = view.prefix
    lowered = lower(checkpoint, view.modules, lambda name: parameter(f"{prefix}{name}"))
    head = lowered.head
    if head is not None and view.form is not None:
        head = head if head.layers else _own_head(head, base.head)
        view.form.check(head)
    edits = {f"{prefix}{name}": edit for name, edit in lowered.edits.items()}
    return replace(lowered, edits=edits, head=head)


def _own_head(head: Head, own: Head | None) -> Head:
    """The base's, for an adapter that brings none."""
    if own is None or own.task is not head.task:
        raise FailedPrecondition(
            "neither the adapter nor the base has a head for this task",
            field=WEIGHTS_FILE,
            found="no tensor of one",
            wanted="base_model.model.classifier or base_model.model.score",
        )
    out_size = list(own.layers.values())[-1].weight.shape[0]
    if head.labels and len(head.labels) != out_size:
        raise FailedPrecondition(
            "does not name the labels of the base's head",
            field=f"{CONFIG_FILE}: id2label",
            found=f"{len(head.labels)} names",
            wanted=f"{out_size} names",
        )
    return replace(head, layers=own.layers)
