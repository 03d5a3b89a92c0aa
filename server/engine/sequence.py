"""One request on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from manylora.server.engine.blocks import BlockList
from manylora.server.engine.prefix import Prefix, token_ids
from manylora.server.engine.types import Request, RequestRecord, Usage


@dataclass(slots=True)
class Gathered:
    """What a pooled request has so far. total: [1, hidden] a sum of hidden rows; outputs: float32
    [n, size], what came of rows that are done."""

    total: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens and where they stand. Owned by the engine's thread."""

    request: Request
    tokens: list[int]  # the adapter's own (ids below zero), prompt, output
    prompt_tokens: int
    rng: np.random.Generator
    stop_ids: frozenset[int]
    prompt_ids: npt.NDArray[np.int64]  # each once, where a penalty asks for them
    output_counts: dict[int, int] = field(default_factory=dict)  # token → times generated
    blocks: BlockList | None = None  # None: waiting
    slot: int = -1  # edit-table row; -1: the base
    prefix: Prefix | None = None  # while it has a slot
    prefix_tokens: int = 0  # leading tokens that are the adapter's own; none for keys on encoders
    acts_from: int = 0  # leading tokens on which the adapter does not act
    computed: int = 0  # leading tokens whose KV is in the cache
    cached_tokens: int = 0
    overtaken: int = 0  # younger requests with adapters, admitted before this one
    gathered: Gathered = field(default_factory=Gathered)  # since it was admitted
    askable: int | None = None  # leading tokens to ask the prefix cache for; None: all
    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @classmethod
    def start(cls, request: Request, eos_token_ids: frozenset[int]) -> Sequence:
        stop_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stop_ids |= eos_token_ids
        penalised = request.prompt if request.sampling.repetition_penalty != 1.0 else []
        return cls(
            request=request,
            tokens=list(request.prompt),
            prompt_tokens=len(request.prompt),
            rng=np.random.Generator(np.random.Philox(request.sampling.seed)),
            stop_ids=stop_ids,
            prompt_ids=np.unique(np.array(penalised, np.int64)),
            arrived=time.monotonic(),
        )

    @property
    def digest(self) -> str:
        """The adapter's digest, "" for the base: the root of the sequence's prefix-cache keys."""
        return "" if self.request.adapter is None else self.request.adapter.digest

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prefix_tokens - self.prompt_tokens

    def prepend(self, prefix: Prefix | None) -> None:
        """The adapter's own tokens come first; known once it is resident. Any number of times."""
        own = token_ids(prefix)
        self.tokens[: self.prefix_tokens] = own
        self.prefix, self.prefix_tokens = prefix, len(own)

    def prepend_rows(self, prefix: Prefix | None) -> None:
        """As `prepend`, on a base without a cache: keys and values are no tokens there."""
        if prefix is not None and prefix.packed.keys_values:
            self.prefix = prefix
        else:
            self.prepend(prefix)

    def append(self, token: int, now: float) -> None:
        self.tokens.append(token)
        self.output_counts[token] = self.output_counts.get(token, 0) + 1
        self.last_token = now
        if self.first_token is None:
            self.first_token = now

    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.cached_tokens, self.output_tokens)

    def record(self, outcome: str) -> RequestRecord:
        now = time.monotonic()
        first = None if self.first_token is None else self.first_token - self.arrived
        per_token = None
        if self.first_token is not None and self.last_token is not None and self.output_tokens > 1:
            per_token = (self.last_token - self.first_token) / (self.output_tokens - 1)
        return RequestRecord(
            adapter=self.request.adapter,
            outcome=outcome,
            usage=self.usage(),
            queue_seconds=(self.admitted or now) - self.arrived,
            first_token_seconds=first,
            per_token_seconds=per_token,
        )
