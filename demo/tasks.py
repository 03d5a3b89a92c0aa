"""The demo's three tasks: data, how the adapter is shaped and trained, how answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.demo.scores import score_email, score_label, score_order
from manylora.training import TrainSettings
from manylora.training.rows import Chat, Message, read_rows

DATA = Path(__file__).parent / "data"


@dataclass(slots=True, frozen=True)
class Example:
    """A held-out row: what is sent, and what is hoped for."""

    prompt: tuple[Message, ...]
    reference: str

    @property
    def text(self) -> str:
        return self.prompt[-1].content


@dataclass(slots=True, frozen=True)
class Task:
    name: str
    title: str
    metric: str
    score: Callable[[str, Example], float]
    max_tokens: int
    rank: int
    alpha: float
    target_modules: str
    epochs: float
    learning_rate: float

    @property
    def adapter(self) -> str:
        return f"demo/{self.name}"

    @property
    def train_file(self) -> Path:
        return DATA / f"{self.name}.train.jsonl"

    def held_out(self) -> list[Example]:
        return read_examples(DATA / f"{self.name}.held_out.jsonl")

    def train_settings(self, base: Path, output: Path) -> TrainSettings:
        return TrainSettings(
            base=str(base),
            data=self.train_file,
            name=self.adapter,
            output=output,
            rank=self.rank,
            alpha=self.alpha,
            target_modules=self.target_modules,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            resume=True,
        )


def read_examples(path: Path) -> list[Example]:
    rows = [row for row in read_rows(path) if isinstance(row, Chat)]
    return [Example(row.messages[:-1], row.messages[-1].content) for row in rows]


TASKS: Sequence[Task] = (
    Task(
        name="tickets",
        title="label a support ticket",
        metric="right label",
        score=lambda reply, example: score_label(reply, example.reference),
        max_tokens=12,
        rank=4,
        alpha=8,
        target_modules="q_proj,v_proj",
        epochs=5,
        learning_rate=3e-3,
    ),
    Task(
        name="orders",
        title="extract an order to JSON",
        metric="fields right",
        score=lambda reply, example: score_order(reply, example.reference),
        max_tokens=64,
        rank=8,
        alpha=16,
        target_modules="q_proj,k_proj,v_proj,o_proj",
        epochs=2,
        learning_rate=2e-3,
    ),
    Task(
        name="emails",
        title="rewrite a note as a formal e-mail",
        metric="six checks",
        score=lambda reply, example: score_email(reply, example.text, example.reference),
        max_tokens=80,
        rank=16,
        alpha=32,
        target_modules="all-linear",
        epochs=2,
        learning_rate=2e-3,
    ),
)
