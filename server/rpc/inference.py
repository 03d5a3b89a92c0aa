# ruff: noqa: N802, ARG002 - the generated base class names the methods and their arguments
"""InferenceService: prompts in, answers out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from manylora.adapters_store.store import Store
from manylora.errors import InvalidArgument
from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.tokenizer import ChatMessage, Tokenizer
from manylora.server.engine.types import (
    AdapterKey,
    Delta,
    FinishReason,
    Logprob,
    Request,
    SamplingParams,
    TokenLogprobs,
    Usage,
)
from manylora.server.rpc.gate import Context
from manylora.server.rpc.resolve import resolve_adapter
from manylora.v1 import inference_pb2 as pb
from manylora.v1 import inference_pb2_grpc as pb_grpc

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_SAMPLING_DEFAULTS = SamplingParams()


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
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        adapter = await self._resolve(request.adapter)
        generation = Request(
            id=uuid.uuid4().hex,
            prompt=await self._tokens(request.prompt),
            sampling=_sampling(request.sampling),
            adapter=adapter,
            deadline=deadline,
        )
        async with aclosing(self._engine.stream(generation)) as deltas:
            async for delta in deltas:
                yield _response(delta, adapter)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        if request.prompt.WhichOneof("content") == "token_ids":
            raise InvalidArgument("tokens already", field="prompt.token_ids", wanted="text or chat")
        return pb.TokenizeResponse(token_ids=await self._tokens(request.prompt))

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
        )

    async def _resolve(self, reference: str) -> AdapterKey | None:
        return await resolve_adapter(self._store, reference)

    async def _tokens(self, prompt: pb.Prompt) -> list[int]:
        """The prompt's token ids, whichever form it has. Raises InvalidArgument if it is empty."""
        tokenizer = self._engine.tokenizer
        match prompt.WhichOneof("content"):
            case "text" if prompt.text:
                return await asyncio.to_thread(tokenizer.encode, prompt.text)
            case "token_ids" if prompt.token_ids.ids:
                return list(prompt.token_ids.ids)
            case "chat" if prompt.chat.messages:
                return await asyncio.to_thread(_chat, tokenizer, prompt.chat)
            case None:
                raise InvalidArgument("not set", field="prompt", wanted="text, token_ids or chat")
            case form:
                raise InvalidArgument("empty", field=f"prompt.{form}")


def _chat(tokenizer: Tokenizer, chat: pb.Chat) -> list[int]:
    return tokenizer.chat([_message(i, message) for i, message in enumerate(chat.messages)])


def _message(index: int, message: pb.ChatMessage) -> ChatMessage:
    if not message.role:
        raise InvalidArgument("not set", field=f"prompt.chat.messages[{index}].role")
    return ChatMessage(message.role, message.content)


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
        adapter="" if adapter is None else adapter.label,
    )


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
