# ruff: noqa: N802, ARG002 - the generated base class names the methods and their arguments
"""InferenceService: prompts in; answers, classes and embeddings out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from manylora.adapters_store.store import Store
from manylora.errors import InvalidArgument
from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.tokenizer import Encoded
from manylora.server.engine.types import (
    AdapterKey,
    Delta,
    FinishReason,
    Logprob,
    Pooled,
    PooledTask,
    Pooling,
    Request,
    SamplingParams,
    TokenLogprobs,
    Usage,
)
from manylora.server.rpc.gate import Context
from manylora.server.rpc.pooled import PROBLEMS, read_pooling, scores, token_scores
from manylora.server.rpc.prompts import read_prompt
from manylora.server.rpc.resolve import resolve_adapter
from manylora.v1 import inference_pb2 as pb
from manylora.v1 import inference_pb2_grpc as pb_grpc

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_SAMPLING_DEFAULTS = SamplingParams()
_LookRequest: TypeAlias = pb.ClassifyRequest | pb.ClassifyTokensRequest | pb.EmbedRequest


@dataclass(slots=True, frozen=True)
class _Looked:
    """What came of a request that wants no text. adapter: as the answers have it."""

    prompt: Encoded
    pooled: Pooled
    adapter: str


class InferenceService(pb_grpc.InferenceServiceServicer):
    """Translates between the protos and the engine."""

    def __init__(self, engine: AsyncEngine, store: Store) -> None:
        self._engine = engine
        self._store = store

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        answer = pb.GenerateResponse()
        texts: list[str] = []
        async with aclosing(self.StreamGenerate(request, context)) as parts:
            async for part in parts:
                texts.append(part.text)
                part.text = ""
                answer.MergeFrom(part)
        answer.text = "".join(texts)
        return answer

    async def StreamGenerate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        asked, _ = await self._ask(request, context)
        asked = replace(asked, sampling=_sampling(request.sampling))
        async with aclosing(self._engine.stream(asked)) as deltas:
            async for delta in deltas:
                yield _response(delta, asked.adapter)

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        looked = await self._look(request, context, Pooling(PooledTask.CLASSIFY))
        pooled = looked.pooled
        return pb.ClassifyResponse(
            labels=pooled.labels,
            scores=scores(pooled.values[0], pooled.problem),
            problem=PROBLEMS[pooled.problem],
            usage=_usage(pooled.usage),
            adapter=looked.adapter,
        )

    async def ClassifyTokens(
        self, request: pb.ClassifyTokensRequest, context: Context
    ) -> pb.ClassifyTokensResponse:
        looked = await self._look(request, context, Pooling(PooledTask.CLASSIFY_TOKENS))
        prompt, pooled = looked.prompt, looked.pooled
        rows = zip(prompt.ids, pooled.values, prompt.spans(), strict=True)
        return pb.ClassifyTokensResponse(
            labels=pooled.labels,
            tokens=[token_scores(token, row, pooled.problem, span) for token, row, span in rows],
            problem=PROBLEMS[pooled.problem],
            usage=_usage(pooled.usage),
            adapter=looked.adapter,
        )

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        rows = read_pooling(request.pooling)
        pooling = Pooling(PooledTask.EMBED, rows, request.normalize)
        looked = await self._look(request, context, pooling)
        return pb.EmbedResponse(
            embedding=looked.pooled.values[0].tolist(),
            usage=_usage(looked.pooled.usage),
            adapter=looked.adapter,
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        if request.prompt.WhichOneof("content") == "token_ids":
            raise InvalidArgument(
                "tokens already", field="prompt.token_ids", wanted="text, chat or pair"
            )
        prompt = await self._read(request.prompt)
        return pb.TokenizeResponse(token_ids=prompt.ids, types=prompt.types)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        info = self._engine.info
        return pb.ModelInfo(
            name=info.name,
            architecture=info.architecture,
            dtype=info.dtype,
            device=info.device,
            kernels=info.kernels,
            max_context=info.max_context,
            vocab_size=info.vocab_size,
            modules=info.modules,
            generates=info.generates,
            tasks=info.tasks,
            token_types=info.token_types,
        )

    async def _look(self, request: _LookRequest, context: Context, pooling: Pooling) -> _Looked:
        asked, prompt = await self._ask(request, context)
        pooled = await self._engine.pool(replace(asked, pooling=pooling))
        return _Looked(prompt, pooled, _label(asked.adapter))

    async def _ask(
        self, request: pb.GenerateRequest | _LookRequest, context: Context
    ) -> tuple[Request, Encoded]:
        """What all of them have in common, for the engine; and the prompt."""
        deadline = _deadline(context)
        adapter = await resolve_adapter(self._store, request.adapter)
        prompt = await self._read(request.prompt)
        asked = Request(
            id=uuid.uuid4().hex,
            prompt=prompt.ids,
            sampling=_SAMPLING_DEFAULTS,
            adapter=adapter,
            deadline=deadline,
            token_types=prompt.types,
        )
        return asked, prompt

    async def _read(self, prompt: pb.Prompt) -> Encoded:
        """The prompt's tokens; of types that the base does not tell apart, none but those that the
        caller gave."""
        engine = self._engine
        encoded = await read_prompt(engine.tokenizer, prompt, engine.info.max_context)
        given = prompt.WhichOneof("content") == "token_ids"
        return encoded if given or engine.info.token_types > 1 else replace(encoded, types=[])


def _deadline(context: Context) -> float | None:
    """time.monotonic() seconds."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _sampling(sampling: pb.Sampling) -> SamplingParams:
    """The engine's parameters; its defaults where the proto's field is not set."""

    def value(name: str) -> Any:
        source = sampling if sampling.HasField(name) else _SAMPLING_DEFAULTS
        return getattr(source, name)

    return SamplingParams(
        max_tokens=value("max_tokens"),
        temperature=value("temperature"),
        top_p=value("top_p"),
        top_k=value("top_k"),
        min_p=value("min_p"),
        seed=value("seed"),
        repetition_penalty=value("repetition_penalty"),
        presence_penalty=value("presence_penalty"),
        frequency_penalty=value("frequency_penalty"),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=value("ignore_eos"),
        logprobs=value("logprobs"),
    )


def _response(delta: Delta, adapter: AdapterKey | None) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_token_logprobs(entry) for entry in delta.logprobs],
        finish_reason=_FINISH_REASONS[delta.finish_reason],
        usage=None if delta.usage is None else _usage(delta.usage),
        adapter=_label(adapter),
    )


def _label(adapter: AdapterKey | None) -> str:
    return "" if adapter is None else adapter.label


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )


def _token_logprobs(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        chosen=_logprob(entry.chosen), top=[_logprob(choice) for choice in entry.top]
    )


def _logprob(entry: Logprob) -> pb.Logprob:
    return pb.Logprob(token_id=entry.token_id, logprob=entry.logprob)
