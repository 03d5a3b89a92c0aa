"""Channels of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc


def open_channel(
    kind: Any,
    target: str,
    root_certificates: bytes | None,
    options: Sequence[tuple[str, Any]],
) -> Any:
    """A channel of `kind`, grpc or grpc.aio; plain without root_certificates. Answers may have any
    size."""
    options = (("grpc.max_receive_message_length", -1), *options)
    if root_certificates is None:
        return kind.insecure_channel(target, options)
    return kind.secure_channel(target, grpc.ssl_channel_credentials(root_certificates), options)
