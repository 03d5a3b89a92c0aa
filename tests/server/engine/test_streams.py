"""Which requests give way where there is no room for another."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manylora_testing.engine import adapter_key

from manylora.errors import ResourceExhausted
from manylora.server.engine.mailbox import ErrorEvent, TokenEvent
from manylora.server.engine.streams import Stream, make_room
from manylora.server.engine.types import AdapterKey, FinishReason, Request, SamplingParams, Usage

TENANTS = st.sampled_from(["a", "b", "c", ""])


def stream_of(tenant: str, state: str = "waits") -> Stream:
    key = AdapterKey("digest", f"{tenant}/adapter@1") if tenant else adapter_key("")
    stream = Stream(Request("id", [1], SamplingParams(), key), tenant)
    if state != "waits":
        ended = FinishReason.LENGTH if state == "ended" else None
        stream.put(TokenEvent("id", 1, None, ended, Usage(1, 0, 1)))
    return stream


def open_requests(streams: list[Stream]) -> Counter[str]:
    return Counter(stream.tenant for stream in streams if not stream.ended)


@given(
    st.lists(st.tuples(TENANTS, st.sampled_from(["waits", "begun", "ended"])), max_size=12),
    st.integers(1, 12),
    TENANTS,
)
def test_who_gives_way(drawn: list[tuple[str, str]], limit: int, caller: str) -> None:
    streams = [stream_of(*one) for one in drawn]
    before = open_requests(streams)
    waited = [stream.waits for stream in streams]
    try:
        make_room(streams, limit, caller)
    except ResourceExhausted as error:
        assert error.retry_after
        assert before.total() >= limit or len(streams) >= 2 * limit
        assert open_requests(streams) == before, "who is refused changes nothing"
        if len(streams) >= 2 * limit:
            return
        larger = [s for s, w in zip(streams, waited, strict=True) if w and not s.ended]
        assert all(before[s.tenant] <= before[caller] + 1 for s in larger)
        return
    given_up = before - open_requests(streams)
    if before.total() < limit:
        assert not given_up and len(streams) < 2 * limit
        return
    ((tenant, count),) = given_up.items()
    assert count == 1
    assert before[tenant] - 1 >= before[caller] + 1, "who gives way has no fewer than the caller"
    (victim,) = [i for i, s in enumerate(streams) if waited[i] and s.ended]
    assert isinstance(streams[victim].events.get_nowait(), ErrorEvent)
    later = streams[victim + 1 :]
    assert not any(s.waits and s.tenant == tenant for s in later), "the newest"


def test_a_lone_tenant_has_the_whole_queue() -> None:
    streams = [stream_of("a") for _ in range(5)]
    make_room(streams, 6, "a")
    with pytest.raises(ResourceExhausted, match="queue is full"):
        make_room(streams, 5, "a")
