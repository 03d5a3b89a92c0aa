"""Python clients of a manylora server.

from manylora.client import Client

with Client("localhost:50051") as client:
    client.publish("acme/tickets", "out/tickets", aliases=["prod"])
    print(client.generate("Printer on fire.", adapter="acme/tickets:prod").text)
    for chunk in client.stream("Printer on fire.", adapter="acme/tickets:prod"):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

from manylora.client.aio import AsyncClient
from manylora.client.sync import Client
from manylora.client.types import (
    AdapterVersion,
    Chunk,
    Classification,
    ClassifiedToken,
    Completion,
    Embedding,
    Logprob,
    ModelInfo,
    Residency,
    Scores,
    TokenClassification,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "AdapterVersion",
    "AsyncClient",
    "Chunk",
    "Classification",
    "ClassifiedToken",
    "Client",
    "Completion",
    "Embedding",
    "Logprob",
    "ModelInfo",
    "Residency",
    "Scores",
    "TokenClassification",
    "TokenLogprobs",
    "Usage",
]
