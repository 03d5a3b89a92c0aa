"""Errors as gRPC statuses: one canonical code each, with google.rpc details."""

from __future__ import annotations

import logging
import re
import uuid

import grpc
from google.protobuf import any_pb2, duration_pb2  # type: ignore[import-untyped]
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from manylora.errors import ManyloraError, ResourceExhausted

DOMAIN = "manylora"
# A status travels in HTTP/2 trailers, of which many clients accept 8 KiB: the message once
# percent-encoded and, with the details, once more in base64.
MAX_MESSAGE_BYTES = 600
MAX_DETAIL_BYTES = 300

_log = logging.getLogger(__name__)


def to_status(error: Exception) -> grpc.Status:
    """The status to end a call with. What is not a ManyloraError becomes INTERNAL with an id that
    the log has too, and nothing else of it."""
    if not isinstance(error, ManyloraError):
        error = _hide(error)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.grpc_code), message=clip(str(error), MAX_MESSAGE_BYTES)
    )
    for detail in _details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def _hide(error: Exception) -> ManyloraError:
    error_id = uuid.uuid4().hex
    _log.error("internal error %s", error_id, exc_info=error)
    return ManyloraError(f"internal error {error_id}; the server's log has more")


def _details(error: ManyloraError) -> list[object]:
    field = clip(error.field)
    description = clip(str(error), MAX_DETAIL_BYTES)
    pairs = {"field": field, "found": clip(error.found or ""), "wanted": clip(error.wanted)}
    info = error_details_pb2.ErrorInfo(
        reason=reason(error), domain=DOMAIN, metadata={k: v for k, v in pairs.items() if v}
    )
    details: list[object] = [info]
    if error.grpc_code == "INVALID_ARGUMENT":
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=description
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    elif error.grpc_code == "NOT_FOUND":
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=f"{DOMAIN}/Adapter",
                resource_name=clip(error.found or ""),
                description=description,
            )
        )
    elif error.grpc_code == "FAILED_PRECONDITION":
        unmet = error_details_pb2.PreconditionFailure.Violation(
            type=reason(error), subject=field, description=description
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[unmet]))
    elif isinstance(error, ResourceExhausted) and error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def reason(error: ManyloraError) -> str:
    """ErrorInfo's reason: the class's name, as FAILED_PRECONDITION for FailedPrecondition."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).upper()


def clip(text: str, limit: int = MAX_DETAIL_BYTES) -> str:
    """At most `limit` bytes of UTF-8; "…" stands for what was cut."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return raw.decode("utf-8")
    return raw[: limit - 3].decode("utf-8", "ignore") + "…"
