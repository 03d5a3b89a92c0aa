"""The data that the engine and its callers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from manylora.adapters_store.head import Problem


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How to choose the next token. Checked by `sampling_params.validate`.

    Order: penalties → temperature → top_k → top_p → min_p → draw. temperature 0 is greedy.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # [0, 1]: least probability, relative to the likeliest token's
    seed: int | None = None
    repetition_penalty: float = 1.0  # [0.01, 100], over prompt and output
    presence_penalty: float = 0.0  # [-2, 2], over output
    frequency_penalty: float = 0.0  # [-2, 2], over output
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; n: the chosen token's and the top n

    @property
    def penalises(self) -> bool:
        frequent = self.presence_penalty or self.frequency_penalty
        return bool(frequent) or self.repetition_penalty != 1.0


@dataclass(slots=True, frozen=True)
class WeightedPart:
    """One of several adapters that a request runs on together."""

    digest: str
    label: str
    weight: float


@dataclass(slots=True, frozen=True)
class AdapterKey:
    """Which adapter version a request runs on. The label alone tells versions apart: each is
    resident by itself, though another tenant's has the same bytes. The prefix cache goes by the
    digest.

    parts: of a composition, which is an adapter of its own; see `composition_key`.
    """

    digest: str = field(compare=False)
    label: str  # "tenant/adapter@version"
    parts: tuple[WeightedPart, ...] = field(default=(), compare=False)

    def uses(self, version: AdapterKey) -> bool:
        """Whether it is this version, or has it as a part."""
        return self == version or any(part.label == version.label for part in self.parts)


class PooledTask(Enum):
    CLASSIFY = "classify"
    CLASSIFY_TOKENS = "classify_tokens"
    EMBED = "embed"


class Rows(Enum):
    """Which of a sequence's final hidden rows are taken, and what becomes of them."""

    FIRST = "first"  # "CLS"
    LAST = "last"
    LAST_UNPADDED = "last_unpadded"  # the last whose token is not the padding's
    MEAN = "mean"
    ALL = "all"  # each by itself


@dataclass(slots=True, frozen=True)
class Pooling:
    """What is wanted of a prompt's final hidden rows, in the place of a continuation.

    rows, normalize: of an embedding. rows: FIRST, LAST or MEAN; None: as is usual for the base, the
    mean for encoders, the last for decoders. normalize: to length 1.
    """

    task: PooledTask
    rows: Rows | None = None
    normalize: bool = False


@dataclass(slots=True, frozen=True, eq=False)
class Pooled:
    """What came of it. values: float32 [n, size], logits or an embedding, n 1 or the prompt's
    tokens. labels: [size] names of logits; problem: how their scores are made."""

    values: npt.NDArray[np.float32]
    labels: tuple[str, ...]
    problem: Problem | None
    usage: Usage


@dataclass(slots=True)
class Request:
    """One generation, or, with `pooling`, one look at the prompt. Token ids are checked by
    `Engine.submit`. token_types: one for each token of the prompt, or none: all 0."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    adapter: AdapterKey | None = None
    deadline: float | None = None  # time.monotonic() seconds
    pooling: Pooling | None = None
    token_types: Sequence[int] = ()

    @property
    def tenant(self) -> str:
        """Whose adapter it is, of several the first one's by name; "" for the base, nobody's."""
        return "" if self.adapter is None else self.adapter.label.partition("/")[0]


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(slots=True, frozen=True)
class Logprob:
    token_id: int
    logprob: float


@dataclass(slots=True, frozen=True)
class TokenLogprobs:
    """The chosen token's log-probability, and the top n's, of the model's own distribution
    (before penalties and temperature)."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(slots=True, frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV came from the prefix cache
    completion_tokens: int


@dataclass(slots=True)
class Delta:
    """One message of a stream. The last one has finish_reason and usage.

    text never ends within a character; it may lag behind token_ids.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(slots=True, frozen=True)
class ModelInfo:
    name: str
    architecture: str
    dtype: str
    device: str
    kernels: str  # backend and instruction set in use
    max_context: int
    vocab_size: int
    modules: int  # adaptable places
    generates: bool  # whether it continues text; an encoder does not
    tasks: tuple[str, ...]  # PEFT's task types whose adapters it serves
    token_types: int  # how many it tells apart; 0: it knows none


class ResidencyState(Enum):
    LOADING = "loading"
    RESIDENT = "resident"
    EVICTED = "evicted"
    FAILED = "failed"


@dataclass(slots=True, frozen=True)
class Residency:
    """One adapter's place on the device; also the event sent when it changes."""

    key: AdapterKey
    state: ResidencyState
    bytes: int = 0
    pinned: bool = False
    in_use: int = 0  # running sequences
    load_seconds: float = 0.0
    error: str = ""


@dataclass(slots=True, frozen=True)
class EngineStats:
    """A snapshot, taken between two steps."""

    waiting: int
    running: int
    blocks_total: int
    blocks_free: int  # prefix-cached blocks that nobody uses count as free
    pool_bytes: int
    pool_bytes_used: int
    slots_total: int
    slots_used: int


@dataclass(slots=True, frozen=True)
class StepRecord:
    seconds: float
    rows: int
    sequences: int
    stats: EngineStats


@dataclass(slots=True, frozen=True)
class RequestRecord:
    """One finished request. outcome: "stop", "length", "pooled", "cancelled", "shed", "deadline"
    or "error"."""

    adapter: AdapterKey | None
    outcome: str
    usage: Usage
    queue_seconds: float
    first_token_seconds: float | None
    per_token_seconds: float | None  # mean after the first token


class Observer(Protocol):
    """Told what happens; called on the engine's thread, so it must be quick and never raise."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_request(self, record: RequestRecord) -> None: ...

    def on_residency(self, event: Residency) -> None: ...
