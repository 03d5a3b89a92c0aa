"""Errors as statuses, and back as the client's errors."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from manylora.client.errors import from_rpc
from manylora.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ManyloraError,
    MissingExtra,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from manylora.server.rpc.status import clip, to_status

CLASSES = [
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    DeadlineExceeded,
    DataLoss,
]
SPECIAL = {
    "INVALID_ARGUMENT": "BadRequest",
    "NOT_FOUND": "ResourceInfo",
    "FAILED_PRECONDITION": "PreconditionFailure",
}


class Ended(grpc.RpcError):
    """A call that ended with a status, as a client's channel shows it."""

    def __init__(self, status: Any) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return str(self._status.details)

    def trailing_metadata(self) -> Any:
        return self._status.trailing_metadata


def details(status: Any) -> dict[str, Any]:
    metadata = dict(status.trailing_metadata)
    packed = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    found = {}
    for detail in packed.details:
        name = detail.type_url.rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        detail.Unpack(found[name])
    return found


@pytest.mark.parametrize("kind", CLASSES)
def test_each_error_comes_back_as_it_was(kind: type[ManyloraError]) -> None:
    error = kind("too much", field="sampling.top_p", found=1.5, wanted="at most 1")
    status = to_status(error)
    assert status.code.name == kind.grpc_code
    found = details(status)
    assert set(found) == {"ErrorInfo", *filter(None, [SPECIAL.get(kind.grpc_code)])}
    assert found["ErrorInfo"].reason == kind.grpc_code
    assert found["ErrorInfo"].domain == "manylora"
    again = from_rpc(Ended(status))
    assert type(again) is kind and str(again) == str(error)
    assert (again.field, again.found, again.wanted) == ("sampling.top_p", "1.5", "at most 1")


@pytest.mark.parametrize("seconds", [0.0, 0.25, 3600.0])
def test_retry_after(seconds: float) -> None:
    again = from_rpc(Ended(to_status(ResourceExhausted("full", retry_after=seconds))))
    assert isinstance(again, ResourceExhausted) and again.retry_after == seconds
    without = from_rpc(Ended(to_status(ResourceExhausted("full"))))
    assert isinstance(without, ResourceExhausted) and without.retry_after is None


def test_the_reason_of_a_missing_extra() -> None:
    status = to_status(MissingExtra("install manylora[gpu]"))
    assert status.code is grpc.StatusCode.UNIMPLEMENTED
    assert details(status)["ErrorInfo"].reason == "MISSING_EXTRA"


def test_what_is_unexpected_stays_inside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status = to_status(KeyError("/secret/path"))
    assert status.code is grpc.StatusCode.INTERNAL
    assert "secret" not in status.details and "KeyError" not in status.details
    assert "secret" not in str(status.trailing_metadata)
    (record,) = caplog.records
    error_id = record.args[0] if isinstance(record.args, tuple) else ""
    assert error_id and str(error_id) in status.details
    assert record.exc_info and isinstance(record.exc_info[1], KeyError)
    again = from_rpc(Ended(status))
    assert type(again) is ManyloraError and str(again).startswith("INTERNAL: ")


@pytest.mark.parametrize("text", ["x" * 100_000, "東" * 100_000, "🦊" * 100_000, "\ud800" * 9999])
def test_statuses_fit_into_what_clients_accept(text: str) -> None:
    """8 KiB of trailers, after percent-encoding and base64."""
    error = InvalidArgument(text, field=text, found=text, wanted=text)
    status = to_status(error)
    (value,) = (value for _, value in status.trailing_metadata)
    percent = sum(1 if 0x20 <= byte < 0x7F else 3 for byte in status.details.encode())
    assert percent + len(value) * 4 // 3 < 7000


def test_clip() -> None:
    assert clip("東京", 6) == "東京"
    assert clip("東京東", 8) == "東…"
    assert clip("") == ""


def test_statuses_of_others() -> None:
    status = to_status(ManyloraError("x"))._replace(
        code=grpc.StatusCode.UNAVAILABLE,
        details="connection refused",
        trailing_metadata=(("grpc-status-details-bin", b"\xff\xff"),),
    )
    again = from_rpc(Ended(status))
    assert type(again) is Unavailable and str(again) == "connection refused"
    assert type(from_rpc(Ended(status._replace(trailing_metadata=None)))) is Unavailable
