"""The gate that every call of our services passes: errors to statuses, and draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc

from manylora.errors import Unavailable
from manylora.server.rpc.status import to_status

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

PREFIX = "/manylora.v1."
ENDLESS = frozenset({"/manylora.v1.AdapterService/WatchAdapters"})


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets calls in until `drain`; other services (health, reflection) pass it by."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], str] = {}
        self._interrupted: set[asyncio.Task[Any]] = set()
        self._draining = False

    async def drain(self, seconds: float) -> None:
        """Refuses new calls, ends the endless ones, and waits for the rest; after `seconds`
        these are ended too. All of them get UNAVAILABLE."""
        self._draining = True
        self._interrupt({task for task, method in self._running.items() if method in ENDLESS})
        if not self._running:
            return
        _, late = await asyncio.wait(set(self._running), timeout=seconds)
        if late:
            self._interrupt(late)
            await asyncio.wait(late)

    def _interrupt(self, tasks: set[asyncio.Task[Any]]) -> None:
        self._interrupted |= tasks
        for task in tasks:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(PREFIX):
            return handler
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream is not None:
            stream = self._stream(handler.unary_stream, method)
            return grpc.unary_stream_rpc_method_handler(stream, **codec)
        if handler.stream_unary is not None:
            unary = self._unary(handler.stream_unary, method)
            return grpc.stream_unary_rpc_method_handler(unary, **codec)
        unary = self._unary(handler.unary_unary, method)
        return grpc.unary_unary_rpc_method_handler(unary, **codec)

    def _unary(self, serve: Callable[[Any, Any], Awaitable[Any]], method: str) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self._inside(context, method):
                return await serve(request, context)

        return call

    def _stream(self, serve: Callable[[Any, Any], Any], method: str) -> Any:
        async def call(request: Any, context: Context) -> None:
            # aclosing: whatever ends the call, the engine's stream is closed before it is over
            async with self._inside(context, method), aclosing(serve(request, context)) as answers:
                async for answer in answers:
                    await context.write(answer)

        return call

    @asynccontextmanager
    async def _inside(self, context: Context, method: str) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = method
        try:
            if self._draining:
                raise Unavailable("the server is draining")
            yield
        except asyncio.CancelledError:
            if task not in self._interrupted:
                raise
            await context.abort_with_status(to_status(Unavailable("the server is stopping")))
        except Exception as error:
            await context.abort_with_status(to_status(error))
        finally:
            del self._running[task]
            self._interrupted.discard(task)
