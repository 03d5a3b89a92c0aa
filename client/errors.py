"""gRPC statuses back as the errors that the server raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.rpc import error_details_pb2, status_pb2

from manylora.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ManyloraError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

DETAILS_KEY = "grpc-status-details-bin"
_CLASSES: dict[str, type[ManyloraError]] = {
    error.grpc_code: error
    for error in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        PermissionDenied,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        DataLoss,
    )
}
_Detail = TypeVar("_Detail", error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo)


@contextmanager
def translated() -> Iterator[None]:
    """Raises what the server raised in place of grpc.RpcError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from None


def from_rpc(error: grpc.RpcError) -> ManyloraError:
    """The error of a call's end: its class by the code, the rest from the google.rpc details.
    Codes that no class has (INTERNAL, CANCELLED, …) give a plain ManyloraError that says them."""
    code, message = error.code().name, error.details() or ""
    found = _CLASSES.get(code)
    result = found(message) if found else ManyloraError(f"{code}: {message}")
    status = _status(error)
    if info := _detail(status, error_details_pb2.ErrorInfo):
        result.field = info.metadata.get("field", "")
        result.found = info.metadata.get("found")
        result.wanted = info.metadata.get("wanted", "")
    retry = _detail(status, error_details_pb2.RetryInfo)
    if retry and isinstance(result, ResourceExhausted):
        result.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return result


def _status(error: grpc.RpcError) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:  # not ours
                break
    return status_pb2.Status()


def _detail(status: status_pb2.Status, kind: type[_Detail]) -> _Detail | None:
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            return detail
    return None
