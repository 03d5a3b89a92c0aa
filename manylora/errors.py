"""The one exception hierarchy. Each class maps once to a gRPC code and an HTTP status.

Every error says which field was wrong, what was found there and what was wanted, so that a
caller can mend the request without reading our code. Bad input changes nothing else.
"""

from __future__ import annotations

from typing import ClassVar


class ManyloraError(Exception):
    """Base of all errors that a caller of manylora may see.

    Args:
        message: one sentence for a person.
        field: path of the offending field, in the request's own words ("sampling.top_p",
            "adapter_model.safetensors: layers.0.q_proj.lora_A.weight"), or "".
        found: what was there, shortened for printing.
        wanted: what would have been right.
    """

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(
        self, message: str, *, field: str = "", found: object = None, wanted: str = ""
    ) -> None:
        self.field = field
        self.found = None if found is None else _shorten(str(found))
        self.wanted = wanted
        detail = message if not field else f"{field}: {message}"
        if self.found is not None:
            detail += f"; found {self.found}"
        if wanted:
            detail += f"; wanted {wanted}"
        super().__init__(detail)


class InvalidArgument(ManyloraError):
    """The request is wrong whatever the server's state."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class NotFound(ManyloraError):
    """No such adapter, version or alias."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class AlreadyExists(ManyloraError):
    """The thing to be made is there already."""

    grpc_code = "ALREADY_EXISTS"
    http_status = 409


class FailedPrecondition(ManyloraError):
    """Right in itself, but not with this base model or in this state."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 409


class PermissionDenied(ManyloraError):
    """The caller may not do this."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class ResourceExhausted(ManyloraError):
    """A limit is reached now; the same call may pass after `retry_after` seconds."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        found: object = None,
        wanted: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, field=field, found=found, wanted=wanted)
        self.retry_after = retry_after


class Unavailable(ManyloraError):
    """The server is starting or draining."""

    grpc_code = "UNAVAILABLE"
    http_status = 503


class DeadlineExceeded(ManyloraError):
    """The caller's deadline passed before the work was done."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class DataLoss(ManyloraError):
    """Stored bytes no longer match their digest."""

    grpc_code = "DATA_LOSS"
    http_status = 500


class MissingExtra(ManyloraError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    grpc_code = "UNIMPLEMENTED"
    http_status = 501


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
