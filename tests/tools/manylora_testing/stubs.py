"""Raw gRPC clients for tests, and how calls are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from manylora.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

_DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.ResourceInfo,
    error_details_pb2.PreconditionFailure,
    error_details_pb2.RetryInfo,
)
Refusal = tuple[str, dict[str, Any]]


class Stubs:
    """Both services over one channel."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self.channel)

    def publish(self, parent: str, adapter_id: str, directory: Path, *aliases: str) -> Any:
        return self.adapters.PublishAdapter(upload(parent, adapter_id, directory, *aliases))


def upload(
    parent: str, adapter_id: str, directory: Path, *aliases: str, chunk_bytes: int = 1000
) -> Iterator[adapters_pb2.PublishAdapterRequest]:
    """A checkpoint directory as PublishAdapter's messages."""
    header = adapters_pb2.PublishHeader(parent=parent, adapter_id=adapter_id, aliases=aliases)
    yield adapters_pb2.PublishAdapterRequest(header=header)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (directory / name).read_bytes()
        for start in range(0, len(data), chunk_bytes):
            yield chunk(name, data[start : start + chunk_bytes])


def chunk(path: str, data: bytes) -> adapters_pb2.PublishAdapterRequest:
    return adapters_pb2.PublishAdapterRequest(chunk=adapters_pb2.FileChunk(path=path, data=data))


def text_request(text: str, adapter: str = "", **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        adapter=adapter,
        prompt=inference_pb2.Prompt(text=text),
        sampling=inference_pb2.Sampling(**sampling),
    )


def refusal(call: Callable[[], Any]) -> Refusal:
    """How a call failed: its code's name, and its google.rpc details by their types' names."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return explain(caught.value)


def explain(error: Any) -> Refusal:
    details: dict[str, Any] = {}
    status = rpc_status.from_call(error)
    for packed in status.details if status else ():
        for kind in _DETAILS:
            if packed.Is(kind.DESCRIPTOR):
                details[kind.DESCRIPTOR.name] = kind()
                packed.Unpack(details[kind.DESCRIPTOR.name])
    return error.code().name, details


def refused_field(call: Callable[[], Any], code: str = "INVALID_ARGUMENT") -> str:
    """The field that the server refused the call for."""
    found, details = refusal(call)
    assert found == code, (found, details)
    info = details["ErrorInfo"]
    assert (info.domain, info.reason) == ("manylora", code)
    field = str(info.metadata["field"])
    if code == "INVALID_ARGUMENT":
        assert [v.field for v in details["BadRequest"].field_violations] == [field]
    return field
