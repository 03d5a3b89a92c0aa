"""Channels of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from manylora.client.requests import utf8

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # find a dead server: ping after a minute of silence in a call, wait 20 s for the answer
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


def open_channel(
    kind: Any,
    target: str,
    root_certificates: bytes | None,
    options: Sequence[tuple[str, Any]],
) -> Any:
    """A channel of `kind`, grpc or grpc.aio; plain without root_certificates. Answers may have any
    size."""
    target = utf8(target, "target")
    options = (*_OPTIONS, *options)
    if root_certificates is None:
        return kind.insecure_channel(target, options)
    return kind.secure_channel(target, grpc.ssl_channel_credentials(root_certificates), options)
