# ruff: noqa: N802, ARG002 - the generated base class names the methods and their arguments
"""AdapterService: what the store has, and what of it is on the device."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path

from google.protobuf import empty_pb2  # type: ignore[import-untyped]

from manylora.adapters_store.adapter_version import AdapterVersion
from manylora.adapters_store.names import check_alias, check_name
from manylora.adapters_store.store import Page, Store
from manylora.adapters_store.upload import Upload
from manylora.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from manylora.server.engine.front import AsyncEngine
from manylora.server.engine.streams import RETRY_SECONDS
from manylora.server.engine.types import AdapterKey, Residency, ResidencyState
from manylora.server.rpc.gate import Context
from manylora.server.rpc.names import format_name, parse_any_parent, parse_name, parse_parent
from manylora.server.rpc.threads import Threads
from manylora.v1 import adapters_pb2 as pb
from manylora.v1 import adapters_pb2_grpc as pb_grpc

STORE_THREADS = 8
COMMITS_AT_ONCE = 2  # each holds a thread that waits for another one: see _check
MAX_UPLOADS = 32  # of a tenant at once
MOST_SILENCE = 60  # seconds between two messages of an upload
DEFAULT_PAGE = 100
MOST_PAGE = 1000

_TOKEN = re.compile(r"[0-9]{1,18}")
_STATES = {
    ResidencyState.LOADING: pb.RESIDENCY_STATE_LOADING,
    ResidencyState.RESIDENT: pb.RESIDENCY_STATE_RESIDENT,
    ResidencyState.EVICTED: pb.RESIDENCY_STATE_EVICTED,
    ResidencyState.FAILED: pb.RESIDENCY_STATE_FAILED,
}


class AdapterService(pb_grpc.AdapterServiceServicer):
    """Translates between the protos, the store and the engine."""

    def __init__(self, engine: AsyncEngine, store: Store, import_roots: Sequence[Path]) -> None:
        self._engine = engine
        self._store = store
        self._import_roots = tuple(import_roots)
        self._threads = Threads(STORE_THREADS, "store")
        self._commits = asyncio.Semaphore(COMMITS_AT_ONCE)
        self._uploads: Counter[str] = Counter()  # under way, by tenant

    async def PublishAdapter(
        self, requests: AsyncIterator[pb.PublishAdapterRequest], context: Context
    ) -> pb.AdapterVersion:
        messages = _lively(requests)
        header = await _read_header(messages)
        name = _new_name(header.parent, header.adapter_id, header.aliases, "header.")
        with self._counted(header.parent):
            upload = self._store.begin_upload()  # not on a thread: a cancel must not lose it
            try:
                async for message in messages:
                    chunk = _chunk(message)
                    await self._threads.run(partial(upload.write, chunk.path, chunk.data))
                version = await self._commit(upload, name, header.aliases)
            finally:
                await self._threads.run(upload.abort)
        return _version(version, await self._residencies())

    @contextmanager
    def _counted(self, tenant: str) -> Iterator[None]:
        """One of a tenant's uploads. Raises ResourceExhausted if it has as many as it may have."""
        if self._uploads[tenant] >= MAX_UPLOADS:
            raise ResourceExhausted(
                "too many uploads of one tenant at once",
                field="header.parent",
                found=f"{self._uploads[tenant]} of {tenant}",
                wanted=f"at most {MAX_UPLOADS}, and another try later",
                retry_after=RETRY_SECONDS,
            )
        self._uploads[tenant] += 1
        try:
            yield
        finally:
            self._uploads[tenant] -= 1
            self._uploads += Counter()  # forgets those without any

    async def _commit(self, upload: Upload, name: str, aliases: Sequence[str]) -> AdapterVersion:
        async with self._commits:
            commit = partial(upload.commit, name, tuple(aliases), self._check())
            return await self._threads.run(commit)

    async def ImportAdapter(
        self, request: pb.ImportAdapterRequest, context: Context
    ) -> pb.AdapterVersion:
        name = _new_name(request.parent, request.adapter_id, request.aliases)
        if not request.path:
            raise InvalidArgument("not set", field="path", wanted="a directory on the server")
        publish = partial(
            self._store.publish_below,
            name,
            request.path,
            self._import_roots,
            tuple(request.aliases),
            self._check(),
        )
        async with self._commits:
            version = await self._threads.run(publish)
        return _version(version, await self._residencies())

    def _check(self) -> Callable[[Path], None]:
        """The store's last check, called on a thread: does it fit the base model, and is the
        caller still there? (gRPC ends a broken upload as it ends a whole one, and only then
        cancels the call.)"""
        loop, call = asyncio.get_running_loop(), asyncio.current_task()

        async def check(path: Path) -> None:
            await self._engine.check_fit(path)
            if call is not None and call.cancelling():
                raise Unavailable("the caller has gone")

        return lambda path: asyncio.run_coroutine_threadsafe(check(path), loop).result()

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.AdapterVersion:
        version = await self._resolve(request.name)
        return _version(version, await self._residencies())

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        if request.parent.count("/") > 1:
            page = await self._threads.run(partial(self._list_versions, request))
        else:
            tenant = parse_any_parent(request.parent)
            page = await self._threads.run(
                partial(self._store.list, tenant, request.page_size, request.page_token)
            )
        residencies = await self._residencies()
        return pb.ListAdaptersResponse(
            adapters=[_version(version, residencies) for version in page.versions],
            next_page_token=page.next_page_token,
        )

    def _list_versions(self, request: pb.ListAdaptersRequest) -> Page:
        """One adapter's versions, newest first; the token is the last one's number."""
        reference = parse_name(request.parent, "parent")
        size, token = request.page_size, request.page_token
        if size < 0:
            raise InvalidArgument("negative", field="page_size", found=size, wanted="0 or more")
        if token and not _TOKEN.fullmatch(token):
            raise InvalidArgument("not a token of this list", field="page_token", found=token)
        versions = self._store.versions(reference)
        rest = [v for v in reversed(versions) if not token or v.version < int(token)]
        page = rest[: min(size or DEFAULT_PAGE, MOST_PAGE)]
        more = len(page) < len(rest)
        return Page(tuple(page), str(page[-1].version) if more else "")

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> empty_pb2.Empty:
        reference = parse_name(request.name)
        if ":" in reference:  # also "latest": it may move between a look and the delete
            raise InvalidArgument(
                "an alias deletes nothing", field="name", found=request.name, wanted="a number"
            )
        await asyncio.shield(self._delete(reference))  # else one that is gone might stay pinned
        return empty_pb2.Empty()

    async def _delete(self, reference: str) -> None:
        for version in await self._threads.run(partial(self._store.delete, reference, "name")):
            await self._release(version)

    async def _release(self, version: AdapterVersion) -> None:
        """Takes a deleted version off the device once no request runs on it."""
        with suppress(Unavailable):  # gone with all others: as wanted
            await self._engine.unload_adapter(_key(version), when_idle=True)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.Residency:
        version = await self._resolve(request.name)
        residency = await self._engine.load_adapter(_key(version), pin=request.pin)
        await asyncio.shield(self._check_still_there(version))
        return _residency(residency)

    async def _check_still_there(self, version: AdapterVersion) -> None:
        """Raises NotFound if a version was deleted while it was loaded, when there was nothing yet
        to take off the device."""
        try:
            await self._threads.run(partial(self._store.resolve, version.label, "name"))
        except NotFound:
            await self._release(version)
            raise

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> empty_pb2.Empty:
        version = await self._resolve(request.name)
        await self._engine.unload_adapter(_key(version))
        return empty_pb2.Empty()

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.Residency]:
        tenant = parse_any_parent(request.parent)
        async with aclosing(self._engine.watch()) as events:
            async for event in events:
                if event.key.parts:
                    continue  # a composition, which is no version of an adapter
                if tenant is None or event.key.label.startswith(f"{tenant}/"):
                    yield _residency(event)

    async def _resolve(self, name: str) -> AdapterVersion:
        return await self._threads.run(partial(self._store.resolve, parse_name(name), "name"))

    async def _residencies(self) -> Mapping[AdapterKey, Residency]:
        return {entry.key: entry for entry in await self._engine.residency()}


async def _lively(
    requests: AsyncIterator[pb.PublishAdapterRequest],
) -> AsyncIterator[pb.PublishAdapterRequest]:
    """The messages, of a caller who does not fall silent."""
    try:
        while True:
            async with asyncio.timeout(MOST_SILENCE):
                message = await anext(requests)
            yield message
    except StopAsyncIteration:
        return
    except TimeoutError:
        raise DeadlineExceeded(
            "no more of the upload came",
            field="upload",
            found=f"{MOST_SILENCE} s of silence",
            wanted="a header and chunks, one after the other",
        ) from None


async def _read_header(requests: AsyncIterator[pb.PublishAdapterRequest]) -> pb.PublishHeader:
    async for message in requests:
        if message.WhichOneof("content") == "header":
            return message.header
        break
    raise InvalidArgument("not set", field="header", wanted="a header in the first message")


def _chunk(message: pb.PublishAdapterRequest) -> pb.FileChunk:
    if message.WhichOneof("content") != "chunk":
        raise InvalidArgument("not set", field="chunk", wanted="one in every message but the first")
    return message.chunk


def _new_name(parent: str, adapter_id: str, aliases: Sequence[str], prefix: str = "") -> str:
    """The store's name for what is to be published. Raises InvalidArgument."""
    tenant = parse_parent(parent, f"{prefix}parent")
    check_name(adapter_id, f"{prefix}adapter_id")
    for i, alias in enumerate(aliases):
        check_alias(alias, f"{prefix}aliases[{i}]")
    return f"{tenant}/{adapter_id}"


def _key(version: AdapterVersion) -> AdapterKey:
    return AdapterKey(version.digest, version.label)


def _version(
    version: AdapterVersion, residencies: Mapping[AdapterKey, Residency]
) -> pb.AdapterVersion:
    residency = residencies.get(_key(version))
    message = pb.AdapterVersion(
        name=format_name(version.label),
        reference=version.label,
        version=version.version,
        digest=version.digest,
        size_bytes=version.size_bytes,
        peft_type=version.peft_type,
        rank=version.rank,
        aliases=version.aliases,
        residency=None if residency is None else _residency(residency),
    )
    message.create_time.FromDatetime(version.created)
    return message


def _residency(residency: Residency) -> pb.Residency:
    message = pb.Residency(
        name=format_name(residency.key.label),
        digest=residency.key.digest,
        state=_STATES[residency.state],
        size_bytes=residency.bytes,
        pinned=residency.pinned,
        in_use=residency.in_use,
        error=residency.error,
    )
    if residency.state is not ResidencyState.LOADING:
        message.load_duration.FromNanoseconds(round(residency.load_seconds * 1e9))
    return message
