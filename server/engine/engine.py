"""The engine's thread: it owns the model, the pool and the KV cache.

Each turn: take messages, pick rows, one forward pass, sample, report.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import assert_never

import torch

from manylora import kernels
from manylora.adapters_store.head import Head
from manylora.errors import DeadlineExceeded, FailedPrecondition, ManyloraError, Unavailable
from manylora.server.engine.blocks import BlockManager
from manylora.server.engine.device import choose_device, choose_kernels
from manylora.server.engine.encoder_runner import run_encoder_step
from manylora.server.engine.encoder_scheduler import EncoderScheduler
from manylora.server.engine.loader import AdapterLoader
from manylora.server.engine.mailbox import (
    Cancel,
    EndEvent,
    ErrorEvent,
    Event,
    Inspect,
    Load,
    Loaded,
    Mailbox,
    Message,
    PooledEvent,
    ResidencyEvent,
    Stop,
    Submit,
    TokenEvent,
    Unload,
    answer,
    refuse,
)
from manylora.server.engine.memory import reserve_cache, reserve_pool
from manylora.server.engine.model import AdaptedModel, EncoderModel, load_base
from manylora.server.engine.placement import Placement
from manylora.server.engine.pooling import check_task, describe, pool_rows, rows_wanted
from manylora.server.engine.prefix import write_prefix
from manylora.server.engine.residency import ResidencyManager
from manylora.server.engine.runner import run_step
from manylora.server.engine.sampler import Sample, sample
from manylora.server.engine.scheduler import Chunk, Scheduler
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import (
    AdapterKey,
    EngineStats,
    FinishReason,
    Observer,
    Residency,
    StepRecord,
)
from manylora.server.engine.warm_up import warm_up

logger = logging.getLogger(__name__)


class Engine:
    """One base model and what runs on it.

    Args:
        settings: sizes and limits.
        fetch: digest → directory of the adapter's checkpoint; called on loader threads.
        deliver: takes each step's events; called on the engine's thread, must not block.
        observer: told of steps and requests; called on the engine's thread.

    Raises:
        FailedPrecondition: the model cannot be served, or the KV cache is too small.
    """

    def __init__(
        self,
        settings: EngineSettings,
        fetch: Callable[[str], Path],
        deliver: Callable[[list[Event]], None],
        observer: Observer,
    ) -> None:
        self.device = choose_device(settings.device)
        self.kernels = choose_kernels(self.device, settings.kernels)
        self.model: AdaptedModel | EncoderModel = load_base(
            settings.model,
            settings.dtype,
            self.device,
            self.kernels,
            quantization=settings.quantization,
        )
        self._settings = settings
        self._deliver = deliver
        self._observer = observer
        self._mailbox = Mailbox()
        self._unhandled: deque[Message] = deque()
        self._events: list[Event] = []
        self._sequences: dict[str, Sequence] = {}

        self.max_context = min(
            settings.max_context or self.model.max_context, self.model.max_context
        )
        blocks = 0
        if isinstance(self.model, AdaptedModel):
            size, block_size = settings.kv_cache_bytes, settings.block_size
            blocks = reserve_cache(self.model, size, block_size, self.device)
            self.max_context = min(self.max_context, blocks * block_size)
        self._loader = AdapterLoader(self.model, self.kernels, fetch, self.max_context)
        table = kernels.EditTable(settings.max_adapters, len(self.model.modules), self.device)
        self._pool = reserve_pool(settings.adapter_bytes, self.model.dtype, self.device)
        self._placement = Placement(self._pool, table, self.model.step.overrides)
        self._residency = ResidencyManager(
            self._placement,
            self._loader.load,
            self._mailbox.put,
            self._notify,
            threads=settings.loader_threads,
        )
        self._blocks = BlockManager(blocks, settings.block_size, prefix_cache=settings.prefix_cache)
        self._scheduler = self._make_scheduler()
        self.model.bind(self._pool.tensor, table)
        if self.kernels.NAME == "triton" and isinstance(self.model, AdaptedModel):
            warm_up(self.model, settings.block_size)
        self.stats = self._snapshot()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, message: Message) -> None:
        """Thread-safe; the only way in. Raises Unavailable if the engine has stopped."""
        if not self._mailbox.put(message):
            raise Unavailable("the server is stopping")

    def check_fit(self, path: Path) -> None:
        """Any thread. Raises InvalidArgument or FailedPrecondition if an adapter's checkpoint is
        broken, not served, or does not fit the base or the adapter memory."""
        self._placement.check_fits(self._loader.lower_and_pack(path))

    def stop(self) -> None:
        """Ends the thread; requests still alive get Unavailable."""
        self._mailbox.put(Stop())
        self._thread.join()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # each thread has its own
            self._serve()
        except Exception:
            logger.exception("the engine has failed and serves no more")
        self._close()

    def _serve(self) -> None:
        """Turn after turn, until a `Stop`."""
        busy = False
        while True:
            self._unhandled += self._mailbox.take(wait=not busy, seconds=self._until_deadline())
            while self._unhandled:
                if isinstance(self._unhandled[0], Stop):
                    return
                self._handle(self._unhandled[0])
                self._unhandled.popleft()
            self._expire()
            busy = self._step()
            self.stats = self._snapshot()
            self._flush()

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(request):
                sequence = Sequence.start(request, frozenset(self.model.eos_token_ids))
                self._sequences[request.id] = sequence
                self._scheduler.add(sequence)
            case Cancel(request_id, outcome):
                if alive := self._sequences.get(request_id):
                    self._finish(alive, outcome)
            case Load(key, pin, done):
                self._residency.load(key, pin, done)
            case Unload(key, done, when_idle):
                self._residency.unload(key, done, when_idle=when_idle)
            case Inspect(done):
                self._flush()  # events older than the answer go before it
                answer(done, self._residency.snapshot())
            case Loaded():
                self._residency.loaded(message)
            case Stop():
                pass
            case _:
                assert_never(message)

    def _step(self) -> bool:
        """One forward pass; False if there was nothing to do."""
        start = time.monotonic()
        chunks, failed = self._scheduler.schedule()
        for sequence, error in failed:
            self._events.append(ErrorEvent(sequence.request.id, error))
            self._forget(sequence, "error")
        if not chunks:
            return bool(failed)
        try:
            with torch.inference_mode():
                logits = self._run_model(chunks)
                sampled = [chunk for chunk in chunks if chunk.samples]
                samples = sample(logits, [chunk.sequence for chunk in sampled])
                pooled = pool_rows(self.model, chunks, self._head)
        except torch.AcceleratorError:
            raise  # nothing can be done on that device any more
        except Exception:
            logger.exception("a step failed; its requests are ended")
            for chunk in chunks:
                self._fail(chunk.sequence, ManyloraError("the step failed"))
            return True
        self._take_in(chunks, sampled, samples)
        for sequence, values in pooled:
            self._take_in_pooled(sequence, values)
        self._observer.on_step(
            StepRecord(
                seconds=time.monotonic() - start,
                rows=sum(chunk.count for chunk in chunks),
                sequences=len(chunks),
                stats=self._snapshot(),
            )
        )
        return True

    def _run_model(self, chunks: list[Chunk]) -> torch.Tensor:
        """Logits of the chunks that sample; an encoder has none."""
        if isinstance(self.model, AdaptedModel):
            return run_step(self.model, chunks, self._settings.block_size, self.device)
        run_encoder_step(self.model, chunks, self.device)
        return torch.empty(0, self.model.vocab_size)

    def _take_in(
        self, chunks: list[Chunk], sampled: list[Chunk], samples: list[Sample | None]
    ) -> None:
        for chunk in chunks:
            self._scheduler.advance(chunk)
        now = time.monotonic()
        for chunk, drawn in zip(sampled, samples, strict=True):
            sequence = chunk.sequence
            if drawn is None:
                self._fail(sequence, self._not_finite("logits"))
                continue
            sequence.append(drawn.token, now)
            reason = self._finish_reason(sequence, drawn.token)
            self._events.append(
                TokenEvent(
                    sequence.request.id, drawn.token, drawn.logprobs, reason, sequence.usage()
                )
            )
            if reason is not None:
                self._finish(sequence, reason.value)

    def _take_in_pooled(self, sequence: Sequence, values: torch.Tensor) -> None:
        if not bool(values.isfinite().all()):
            self._fail(sequence, self._not_finite("values"))
            return
        head = self._head(sequence.request.adapter)
        pooled = describe(sequence, values, self.model, head)
        self._events.append(PooledEvent(sequence.request.id, pooled))
        sequence.first_token = time.monotonic()
        self._finish(sequence, "pooled")

    def _not_finite(self, what: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"the {what} are not finite in {self.model.dtype}", field="adapter"
        )

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token in sequence.stop_ids:
            return FinishReason.STOP
        if sequence.output_tokens >= sequence.request.sampling.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.tokens) >= self.max_context:
            return FinishReason.LENGTH
        return None

    # -- ends of requests ----------------------------------------------------------------------

    def _finish(self, sequence: Sequence, outcome: str) -> None:
        self._scheduler.remove(sequence)
        self._forget(sequence, outcome)

    def _fail(self, sequence: Sequence, error: ManyloraError, outcome: str = "error") -> None:
        self._events.append(ErrorEvent(sequence.request.id, error))
        self._finish(sequence, outcome)

    def _forget(self, sequence: Sequence, outcome: str) -> None:
        del self._sequences[sequence.request.id]
        self._observer.on_request(sequence.record(outcome))

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in list(self._sequences.values()):
            deadline = sequence.request.deadline
            if deadline is not None and deadline <= now:
                error = DeadlineExceeded("the deadline passed before the answer was complete")
                self._fail(sequence, error, "deadline")

    def _until_deadline(self) -> float | None:
        deadlines = [
            s.request.deadline for s in self._sequences.values() if s.request.deadline is not None
        ]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _close(self) -> None:
        """Leaves nobody waiting: neither requests nor those whose message came too late."""
        error = Unavailable("the server is stopping")
        for sequence in list(self._sequences.values()):
            self._events.append(ErrorEvent(sequence.request.id, error))
            self._forget(sequence, "cancelled")
        for message in (*self._unhandled, *self._mailbox.close()):
            match message:
                case Submit(request):
                    self._events.append(ErrorEvent(request.id, error))
                case Load(_, _, done) | Unload(_, done, _) | Inspect(done):
                    refuse(done, error)
        self._residency.close()
        self._events.append(EndEvent())
        self._flush()

    # -- parts ---------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._events:
            self._deliver(self._events)
            self._events = []

    def _notify(self, residency: Residency) -> None:
        self._events.append(ResidencyEvent(residency))
        self._observer.on_residency(residency)

    def _head(self, key: AdapterKey | None) -> Head | None:
        """Of a resident adapter, or the base's own."""
        return self.model.tasks.head if key is None else self._residency.head(key)

    def _check_task(self, sequence: Sequence) -> ManyloraError | None:
        """Whether the request's adapter can do what it wants; and from which of its tokens on no
        cached keys will do."""
        error = check_task(sequence, self._head(sequence.request.adapter))
        if error is None and sequence.request.pooling is not None:
            sequence.askable = rows_wanted(sequence, self.model)[0].start + 1
        return error

    def _make_scheduler(self) -> Scheduler | EncoderScheduler:
        settings = self._settings
        if isinstance(self.model, EncoderModel):
            return EncoderScheduler(
                self._residency,
                max_batch_tokens=settings.max_batch_tokens,
                max_sequences=settings.max_sequences,
                max_context=self.max_context,
                check=self._check_task,
            )
        return Scheduler(
            self._blocks,
            self._residency,
            max_batch_tokens=settings.max_batch_tokens,
            max_sequences=settings.max_sequences,
            max_context=self.max_context,
            write_prefix=partial(write_prefix, self.model, settings.block_size),
            check=self._check_task,
        )

    def _snapshot(self) -> EngineStats:
        itemsize = self._pool.tensor.element_size()
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            blocks_total=self._blocks.total,
            blocks_free=self._blocks.free,
            pool_bytes=self._pool.size * itemsize,
            pool_bytes_used=self._pool.used * itemsize,
            slots_total=self._settings.max_adapters,
            slots_used=self._placement.slots_used,
        )
