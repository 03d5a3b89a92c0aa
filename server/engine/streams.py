"""The requests that callers wait for, and which of them gives way where there is no room."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from manylora.errors import ResourceExhausted
from manylora.server.engine.mailbox import ErrorEvent, PooledEvent, RequestEvent
from manylora.server.engine.types import Request

RETRY_SECONDS = 1.0  # advice to a caller who finds the queue full


@dataclass(slots=True)
class Stream:
    """A request and what the engine tells of it. waits: nothing yet, though its prompt may be under
    way. ended: all there is, though it may not have been read."""

    request: Request
    tenant: str
    events: asyncio.Queue[RequestEvent] = field(default_factory=asyncio.Queue)
    waits: bool = True
    ended: bool = False

    def put(self, event: RequestEvent) -> None:
        self.waits = False
        last = isinstance(event, ErrorEvent | PooledEvent) or event.finish_reason is not None
        self.ended = self.ended or last
        self.events.put_nowait(event)


def make_room(streams: Collection[Stream], limit: int, tenant: str) -> None:
    """Room for one more request of the tenant's among those that have not ended, at most `limit`;
    with those that nobody reads to their end, at most twice as many.

    Where there is none, a tenant that has more requests than the caller would have gives up the
    newest of which nothing has come yet: of several such tenants the one that has the most.

    Args:
        streams: in the order of arrival.

    Raises:
        ResourceExhausted: nobody gives way.
    """
    if len(streams) < limit:
        return
    full = ResourceExhausted(
        "the queue is full", field="requests", found=limit, retry_after=RETRY_SECONDS
    )
    if len(streams) >= 2 * limit:
        raise full
    open_ = [stream for stream in streams if not stream.ended]
    if len(open_) < limit:
        return
    held = Counter(stream.tenant for stream in open_)
    giving = [s for s in open_ if s.waits and held[s.tenant] > held[tenant] + 1]
    if not giving:
        raise full
    newest = max(reversed(giving), key=lambda stream: held[stream.tenant])
    newest.put(ErrorEvent(newest.request.id, full))
