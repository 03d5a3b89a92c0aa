"""The engine as the asyncio side sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from pathlib import Path

from manylora.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from manylora.kernels import Backend, cpu
from manylora.server.engine import sampling_params
from manylora.server.engine.detokenizer import Detokenizer, StopStrings
from manylora.server.engine.engine import Engine
from manylora.server.engine.mailbox import (
    Cancel,
    EndEvent,
    ErrorEvent,
    Event,
    Inspect,
    Load,
    PooledEvent,
    ResidencyEvent,
    Submit,
    TokenEvent,
    Unload,
)
from manylora.server.engine.model import AdaptedModel, EncoderModel
from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.streams import Stream, make_room
from manylora.server.engine.tokenizer import Tokenizer
from manylora.server.engine.types import (
    AdapterKey,
    Delta,
    EngineStats,
    FinishReason,
    ModelInfo,
    Observer,
    Pooled,
    Request,
    Residency,
    Usage,
)

MAX_EVENTS = 64  # that become one delta, of a reader who has fallen behind
MAX_UNREAD = 10_000  # events kept for a watcher who does not read


class AsyncEngine:
    """Streams, loads and watches, from one asyncio loop. Only `Mailbox` lies between the two
    sides; text and stop strings are made here, off the engine's thread."""

    def __init__(
        self, settings: EngineSettings, fetch: Callable[[str], Path], observer: Observer
    ) -> None:
        """Loads the model; blocks for as long as that takes."""
        self.tokenizer = Tokenizer(settings.model)
        self._engine = Engine(settings, fetch, self._deliver, observer)
        self._limit = settings.max_waiting + settings.max_sequences
        self._streams: dict[str, Stream] = {}
        self._watchers: set[asyncio.Queue[Residency | None]] = set()  # None: no more events
        self._ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        model = self._engine.model
        self.info = ModelInfo(
            name=settings.model_name or settings.model.resolve().name,
            architecture=type(model.model).__name__,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(self._engine.device),
            kernels=_describe(self._engine.kernels),
            max_context=self._engine.max_context,
            vocab_size=model.vocab_size,
            modules=len(model.modules),
            generates=isinstance(model, AdaptedModel),
            tasks=tuple(task.value for task in model.tasks.views),
            token_types=model.type_vocab_size if isinstance(model, EncoderModel) else 0,
        )

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def stop(self) -> None:
        """Ends at once; streams still open raise Unavailable."""
        await asyncio.to_thread(self._engine.stop)

    async def failed(self) -> None:
        """Returns when the engine's thread has ended, though nobody stopped it."""
        await self._ended.wait()

    async def drain(self, seconds: float) -> None:
        """Returns when no request is left, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def stats(self) -> EngineStats:
        return self._engine.stats

    # -- generation ----------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The answer, as it comes. Closing the iterator frees the request's blocks within a step.

        Raises:
            InvalidArgument: the prompt or a sampling value makes no sense.
            ResourceExhausted: the queue is full, or it was and another tenant had fewer requests.
            FailedPrecondition: the adapter does not fit the base.
            DeadlineExceeded: not done in time.
            Unavailable: the server is stopping.
        """
        self._check(request)
        queue = self._open(request).events
        outcome = "cancelled"
        try:
            detokenizer = Detokenizer(self.tokenizer.decode, request.prompt)
            stops = StopStrings(request.sampling.stop)
            tokens = 0
            while True:
                events = [await queue.get()]
                while not queue.empty() and len(events) < MAX_EVENTS:
                    events.append(queue.get_nowait())
                delta = Delta(text="", token_ids=[])
                for event in events:
                    if isinstance(event, ErrorEvent):
                        outcome = "shed"  # unless the engine has ended it
                        raise event.error
                    assert isinstance(event, TokenEvent)
                    tokens += 1
                    if _extend(delta, event, detokenizer, stops, tokens):
                        outcome = delta.finish_reason.value if delta.finish_reason else outcome
                        break
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._leave(request, outcome)

    async def pool(self, request: Request) -> Pooled:
        """The classes or the embedding of a prompt. Cancelled, it frees what it holds within a
        step. Raises what `stream` does, and FailedPrecondition where the adapter is not for
        this."""
        self._check(request)
        queue = self._open(request).events
        outcome = "cancelled"
        try:
            event = await queue.get()
            if isinstance(event, ErrorEvent):
                outcome = "shed"
                raise event.error
            assert isinstance(event, PooledEvent)
            return event.pooled
        finally:
            self._leave(request, outcome)

    def _open(self, request: Request) -> Stream:
        """Hands the request to the engine, which tells of it in the stream. Raises
        ResourceExhausted."""
        make_room(self._streams.values(), self._limit, request.tenant)
        self._engine.put(Submit(request))
        stream = self._streams[request.id] = Stream(request, request.tenant)
        self._idle.clear()
        return stream

    def _leave(self, request: Request, outcome: str) -> None:
        """The caller wants no more of it; no news to the engine where it has ended."""
        del self._streams[request.id]
        if not self._streams:
            self._idle.set()
        with contextlib.suppress(Unavailable):
            self._engine.put(Cancel(request.id, outcome))

    def _check(self, request: Request) -> None:
        vocab = self.info.vocab_size
        most = self.info.max_context - (request.pooling is None)  # room for an answer
        if request.pooling is None and not self.info.generates:
            raise FailedPrecondition(
                "the base model is an encoder, which continues no text", field="model"
            )
        if not request.prompt:
            raise InvalidArgument("empty", field="prompt", wanted="at least one token")
        if len(request.prompt) > most:
            raise InvalidArgument(
                "longer than the context leaves room for",
                field="prompt",
                found=f"{len(request.prompt)} tokens",
                wanted=f"at most {most}",
            )
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= vocab:
            raise InvalidArgument(
                "token id outside the vocabulary",
                field="prompt.token_ids",
                found=low if low < 0 else high,
                wanted=f"0 to {vocab - 1}",
            )
        self._check_types(request)
        sampling_params.validate(request.sampling, vocab)
        if request.id in self._streams:
            raise InvalidArgument("a request with this id is running", field="id", found=request.id)

    def _check_types(self, request: Request) -> None:
        types, known = request.token_types, self.info.token_types
        if not types:
            return
        if not known:
            raise InvalidArgument(
                "the base tells no token types apart", field="prompt.token_ids.types", wanted="none"
            )
        if len(types) != len(request.prompt):
            raise InvalidArgument(
                "not one for each token",
                field="prompt.token_ids.types",
                found=len(types),
                wanted=str(len(request.prompt)),
            )
        for value in (min(types), max(types)):
            if not 0 <= value < known:
                raise InvalidArgument(
                    "no such token type",
                    field="prompt.token_ids.types",
                    found=value,
                    wanted=f"0 to {known - 1}",
                )

    # -- adapters ------------------------------------------------------------------------------

    async def load_adapter(self, key: AdapterKey, *, pin: bool) -> Residency:
        """Returns when the adapter is resident. Raises what is wrong with it."""
        done: Future[Residency] = Future()
        self._engine.put(Load(key, pin, done))
        return await asyncio.wrap_future(done)

    async def unload_adapter(self, key: AdapterKey, *, when_idle: bool = False) -> None:
        """when_idle: one in use, or on its way, goes as soon as no request wants it, and it is no
        error if it is not there.

        Raises NotFound if it is not resident, FailedPrecondition if it is in use.
        """
        done: Future[None] = Future()
        self._engine.put(Unload(key, done, when_idle))
        await asyncio.wrap_future(done)

    async def residency(self) -> list[Residency]:
        done: Future[list[Residency]] = Future()
        self._engine.put(Inspect(done))
        return await asyncio.wrap_future(done)

    async def watch(self) -> AsyncGenerator[Residency, None]:
        """What is resident now, then every change after that.

        Raises ResourceExhausted if the caller falls too far behind.
        """
        queue: asyncio.Queue[Residency | None] = asyncio.Queue()
        loop, leaving = asyncio.get_running_loop(), False

        def listen() -> None:
            if not leaving:
                self._watchers.add(queue)

        done: Future[list[Residency]] = Future()
        # called by the engine's thread as it answers: after all earlier events, before later ones
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(listen))
        self._engine.put(Inspect(done))
        try:
            for residency in await asyncio.wrap_future(done):
                yield residency
            while (event := await queue.get()) is not None:
                yield event
            raise ResourceExhausted("the watcher reads too slowly", found=f"{MAX_UNREAD} unread")
        finally:
            leaving = True
            self._watchers.discard(queue)

    async def check_fit(self, path: Path) -> None:
        """Raises FailedPrecondition or InvalidArgument if the checkpoint in `path` cannot be
        served on this base, naming the tensor, its shape and the shape wanted."""
        await asyncio.to_thread(self._engine.check_fit, path)

    # -- from the engine's thread --------------------------------------------------------------

    def _deliver(self, events: list[Event]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._spread, events)

    def _spread(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, EndEvent):
                self._ended.set()
            elif isinstance(event, ResidencyEvent):
                for watcher in tuple(self._watchers):
                    if watcher.qsize() < MAX_UNREAD:
                        watcher.put_nowait(event.residency)
                    else:
                        watcher.put_nowait(None)
                        self._watchers.remove(watcher)
            elif stream := self._streams.get(event.request_id):
                stream.put(event)


def _describe(backend: Backend) -> str:
    """The backend, and on the CPU the instruction set that it uses."""
    return f"{backend.NAME} {cpu.current_isa()}" if backend.NAME == cpu.NAME else backend.NAME


def _extend(
    delta: Delta,
    event: TokenEvent,
    detokenizer: Detokenizer,
    stops: StopStrings,
    tokens: int,
) -> bool:
    """Adds one token to a delta; True if it is the answer's last."""
    delta.token_ids.append(event.token)
    if event.logprobs is not None:
        delta.logprobs.append(event.logprobs)
    # a stop token ends the answer and is no part of its text
    text = "" if event.finish_reason is FinishReason.STOP else detokenizer.push(event.token)
    if event.finish_reason is not None:
        text += detokenizer.flush()
    text, stopped = stops.push(text)
    delta.text += text
    if stopped:
        delta.finish_reason = FinishReason.STOP
    elif event.finish_reason is not None:
        delta.text += stops.flush()
        delta.finish_reason = event.finish_reason
    else:
        return False
    delta.usage = Usage(event.usage.prompt_tokens, event.usage.cached_tokens, tokens)
    return True
