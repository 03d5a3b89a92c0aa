"""A real server with a tiny model, and raw gRPC clients of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from manylora_testing.served import Served
from manylora_testing.served_fixtures import (
    adapter_dirs,
    base_model,
    server,
    settings,
    tenant,
)
from manylora_testing.stubs import Stubs

__all__ = ["adapter_dirs", "base_model", "server", "settings", "tenant"]


@pytest.fixture
def connect() -> Iterator[Callable[[Served], Stubs]]:
    """Stubs for a server; their channels are closed with the test."""
    made: list[Stubs] = []

    def connect(server: Served) -> Stubs:
        made.append(Stubs(server.target))
        return made[-1]

    yield connect
    for stubs in made:
        stubs.channel.close()


@pytest.fixture
def stubs(server: Served, connect: Callable[[Served], Stubs]) -> Stubs:
    return connect(server)
