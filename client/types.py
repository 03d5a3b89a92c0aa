"""What the clients return."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from manylora.v1 import adapters_pb2, inference_pb2

FinishReason = Literal["stop", "length"]
State = Literal["loading", "resident", "evicted", "failed"]
Problem = Literal["single_label", "multi_label", "regression"]

_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}
_PROBLEMS: dict[int, Problem] = {
    inference_pb2.PROBLEM_SINGLE_LABEL: "single_label",
    inference_pb2.PROBLEM_MULTI_LABEL: "multi_label",
    inference_pb2.PROBLEM_REGRESSION: "regression",
}
_STATES: dict[int, State] = {
    adapters_pb2.RESIDENCY_STATE_LOADING: "loading",
    adapters_pb2.RESIDENCY_STATE_RESIDENT: "resident",
    adapters_pb2.RESIDENCY_STATE_EVICTED: "evicted",
    adapters_pb2.RESIDENCY_STATE_FAILED: "failed",
}


@dataclass(slots=True, frozen=True)
class Logprob:
    token_id: int
    logprob: float  # natural logarithm


@dataclass(slots=True, frozen=True)
class TokenLogprobs:
    """One position's log-probabilities, by the model's own distribution."""

    chosen: Logprob
    top: tuple[Logprob, ...]  # the likeliest first


@dataclass(slots=True, frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int  # of the prompt's, those that came from the prefix cache
    completion_tokens: int


@dataclass(slots=True, frozen=True)
class Chunk:
    """A part of an answer. The last one has finish_reason and usage."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    adapter: str  # the version that answers, "tenant/adapter@3"; "" for the base
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(slots=True, frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # empty unless asked for
    adapter: str  # the version that answered, "tenant/adapter@3"; "" for the base
    finish_reason: FinishReason
    usage: Usage


@dataclass(slots=True, frozen=True)
class Scores:
    """One number for each label. problem: how scores come of logits, by softmax ("single_label"),
    sigmoid ("multi_label") or as they are ("regression")."""

    labels: tuple[str, ...]
    logits: tuple[float, ...]
    scores: tuple[float, ...]
    problem: Problem

    @property
    def label(self) -> str:
        """The one with the highest score."""
        return max(zip(self.scores, self.labels, strict=True), key=lambda pair: pair[0])[1]


@dataclass(slots=True, frozen=True)
class Classification(Scores):
    """The scores of a prompt."""

    adapter: str  # the version that answered, "tenant/adapter@3"; "" for the base
    usage: Usage


@dataclass(slots=True, frozen=True)
class ClassifiedToken(Scores):
    """The scores of one token."""

    token_id: int
    span: tuple[int, int] | None  # its characters of the text; None for special tokens
    text: int  # which of a pair's texts `span` is of: 0 or 1


@dataclass(slots=True, frozen=True)
class TokenClassification:
    """The scores of a prompt's tokens, special tokens included."""

    tokens: tuple[ClassifiedToken, ...]
    adapter: str  # the version that answered, "tenant/adapter@3"; "" for the base
    usage: Usage


@dataclass(slots=True, frozen=True)
class Embedding:
    """A prompt as one vector."""

    embedding: tuple[float, ...]
    adapter: str  # the version that answered, "tenant/adapter@3"; "" for the base
    usage: Usage


@dataclass(slots=True, frozen=True)
class ModelInfo:
    name: str
    architecture: str
    dtype: str
    device: str
    kernels: str  # backend and instruction set in use
    max_context: int  # tokens of prompt and answer
    vocab_size: int
    modules: int  # places that an adapter can change
    generates: bool  # whether it continues text; an encoder does not
    tasks: tuple[str, ...]  # PEFT's task types whose adapters it serves
    token_types: int  # how many it tells apart; 0: it knows none


@dataclass(slots=True, frozen=True)
class Residency:
    """An adapter version's place on the device."""

    adapter: str  # "tenant/adapter@3"
    digest: str
    state: State
    size_bytes: int
    pinned: bool
    in_use: int  # requests that run on it
    load_seconds: float
    error: str


@dataclass(slots=True, frozen=True)
class AdapterVersion:
    adapter: str  # "tenant/adapter@3"
    version: int
    digest: str  # SHA-256, hexadecimal
    size_bytes: int
    created: datetime  # UTC
    peft_type: str
    rank: int
    aliases: tuple[str, ...]
    residency: Residency | None  # None: not on the device


def chunk(message: inference_pb2.GenerateResponse) -> Chunk:
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_token_logprobs(entry) for entry in message.logprobs),
        adapter=message.adapter,
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        usage=_usage(message.usage) if message.HasField("usage") else None,
    )


def completion(message: inference_pb2.GenerateResponse) -> Completion:
    return Completion(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_token_logprobs(entry) for entry in message.logprobs),
        adapter=message.adapter,
        finish_reason=_FINISH_REASONS[message.finish_reason],
        usage=_usage(message.usage),
    )


def classification(message: inference_pb2.ClassifyResponse) -> Classification:
    return Classification(
        labels=tuple(message.labels),
        logits=tuple(message.scores.logits),
        scores=tuple(message.scores.scores),
        problem=_PROBLEMS[message.problem],
        adapter=message.adapter,
        usage=_usage(message.usage),
    )


def token_classification(message: inference_pb2.ClassifyTokensResponse) -> TokenClassification:
    labels, problem = tuple(message.labels), _PROBLEMS[message.problem]
    tokens = tuple(
        ClassifiedToken(
            labels=labels,
            logits=tuple(token.scores.logits),
            scores=tuple(token.scores.scores),
            problem=problem,
            token_id=token.token_id,
            span=(token.span.start, token.span.end) if token.HasField("span") else None,
            text=token.span.text,
        )
        for token in message.tokens
    )
    return TokenClassification(tokens, message.adapter, _usage(message.usage))


def embedding(message: inference_pb2.EmbedResponse) -> Embedding:
    return Embedding(tuple(message.embedding), message.adapter, _usage(message.usage))


def _usage(message: inference_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


def _token_logprobs(message: inference_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(_logprob(message.chosen), tuple(map(_logprob, message.top)))


def _logprob(message: inference_pb2.Logprob) -> Logprob:
    return Logprob(message.token_id, message.logprob)


def model_info(message: inference_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        dtype=message.dtype,
        device=message.device,
        kernels=message.kernels,
        max_context=message.max_context,
        vocab_size=message.vocab_size,
        modules=message.modules,
        generates=message.generates,
        tasks=tuple(message.tasks),
        token_types=message.token_types,
    )


def adapter_version(message: adapters_pb2.AdapterVersion) -> AdapterVersion:
    return AdapterVersion(
        adapter=message.reference,
        version=message.version,
        digest=message.digest,
        size_bytes=message.size_bytes,
        created=message.create_time.ToDatetime(tzinfo=UTC),
        peft_type=message.peft_type,
        rank=message.rank,
        aliases=tuple(message.aliases),
        residency=residency(message.residency) if message.HasField("residency") else None,
    )


def residency(message: adapters_pb2.Residency) -> Residency:
    _, tenant, _, adapter, _, version = message.name.split("/")
    return Residency(
        adapter=f"{tenant}/{adapter}@{version}",
        digest=message.digest,
        state=_STATES[message.state],
        size_bytes=message.size_bytes,
        pinned=message.pinned,
        in_use=message.in_use,
        load_seconds=message.load_duration.ToTimedelta().total_seconds(),
        error=message.error,
    )
