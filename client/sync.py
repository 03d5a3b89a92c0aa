"""The synchronous client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from manylora.client import requests, types
from manylora.client.channel import open_channel
from manylora.client.errors import translated
from manylora.client.requests import Adapter, Messages
from manylora.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc


class Client:
    """Talks to one manylora server. Adapters are named "tenant/adapter", "tenant/adapter@3" or
    "tenant/adapter:alias"; "" is the base model. Where they answer, several may do so together,
    with weights: {"tenant/a": 0.7, "tenant/b": 0.3}.

    Args:
        target: "host:port".
        root_certificates: PEM of the certificates to trust; without it the connection is plain.
        timeout: seconds for a call, where the call does not say its own. Default: no limit.
        options: gRPC channel options.

    Raises, in every method: the classes of manylora.errors, as the server raised them;
    Unavailable where no server answers.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        root_certificates: bytes | None = None,
        timeout: float | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self._channel = open_channel(grpc, target, root_certificates, options)
        self._timeout = timeout
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: Adapter = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        stop: Sequence[str] | str | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        logprobs: int | None = None,
        timeout: float | None = None,
    ) -> types.Completion:
        """Answers a prompt, given as text, chat messages or token ids: exactly one of them.
        What is None has the server's default; see Sampling in protos/manylora/v1/inference.proto.
        """
        request = requests.generate(
            requests.prompt(prompt, messages, token_ids),
            adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        )
        with translated():
            answer = self._inference.Generate(
                request, timeout=requests.limit(timeout, self._timeout)
            )
        return types.completion(answer)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: Adapter = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        stop: Sequence[str] | str | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        logprobs: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[types.Chunk]:
        """As `generate`, in parts as they are made. Closing the iterator stops the work."""
        request = requests.generate(
            requests.prompt(prompt, messages, token_ids),
            adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        )
        call = self._inference.StreamGenerate(
            request, timeout=requests.limit(timeout, self._timeout)
        )
        try:
            with translated():
                for part in call:
                    yield types.chunk(part)
        finally:
            call.cancel()

    def classify(
        self,
        prompt: str | None = None,
        *,
        pair: tuple[str, str] | None = None,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        token_types: Sequence[int] = (),
        adapter: Adapter = "",
        timeout: float | None = None,
    ) -> types.Classification:
        """Scores a prompt with the adapter's classifier, or the base's own. The prompt is exactly
        one of a text, a pair of texts, chat messages, and token ids; these may have types."""
        request = inference_pb2.ClassifyRequest(
            prompt=requests.prompt(prompt, messages, token_ids, pair=pair, token_types=token_types),
            adapter=requests.adapter_reference(adapter),
        )
        with translated():
            answer = self._inference.Classify(
                request, timeout=requests.limit(timeout, self._timeout)
            )
        return types.classification(answer)

    def classify_tokens(
        self,
        prompt: str | None = None,
        *,
        pair: tuple[str, str] | None = None,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        token_types: Sequence[int] = (),
        adapter: Adapter = "",
        timeout: float | None = None,
    ) -> types.TokenClassification:
        """As `classify`, for each token of the prompt."""
        request = inference_pb2.ClassifyTokensRequest(
            prompt=requests.prompt(prompt, messages, token_ids, pair=pair, token_types=token_types),
            adapter=requests.adapter_reference(adapter),
        )
        with translated():
            answer = self._inference.ClassifyTokens(
                request, timeout=requests.limit(timeout, self._timeout)
            )
        return types.token_classification(answer)

    def embed(
        self,
        prompt: str | None = None,
        *,
        pair: tuple[str, str] | None = None,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        token_types: Sequence[int] = (),
        adapter: Adapter = "",
        pooling: requests.Pooling | None = None,
        normalize: bool = False,
        timeout: float | None = None,
    ) -> types.Embedding:
        """One vector of a prompt, given as to `classify`. pooling: "first", "last" or "mean" of
        the tokens' hidden rows; None: the mean on encoders, the last on other bases."""
        request = inference_pb2.EmbedRequest(
            prompt=requests.prompt(prompt, messages, token_ids, pair=pair, token_types=token_types),
            adapter=requests.adapter_reference(adapter),
            pooling=requests.pooling(pooling),
            normalize=normalize,
        )
        with translated():
            answer = self._inference.Embed(request, timeout=requests.limit(timeout, self._timeout))
        return types.embedding(answer)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        pair: tuple[str, str] | None = None,
    ) -> tuple[int, ...]:
        """The token ids that a prompt of this text, of these messages or of this pair has."""
        prompt = requests.prompt(text, messages, None, pair=pair)
        request = inference_pb2.TokenizeRequest(prompt=prompt)
        with translated():
            answer = self._inference.Tokenize(request, timeout=self._timeout)
        return tuple(answer.token_ids)

    def model_info(self) -> types.ModelInfo:
        """The base model that the server has."""
        with translated():
            answer = self._inference.GetModelInfo(
                inference_pb2.GetModelInfoRequest(), timeout=self._timeout
            )
        return types.model_info(answer)

    def publish(
        self, name: str, path: str | Path, aliases: Sequence[str] | str = ()
    ) -> types.AdapterVersion:
        """Uploads the PEFT checkpoint in the directory `path` as a version of "tenant/adapter"."""
        messages = requests.upload(name, Path(path), aliases)
        with translated():
            answer = self._adapters.PublishAdapter(messages, timeout=self._timeout)
        return types.adapter_version(answer)

    def import_adapter(
        self, name: str, path: str | Path, aliases: Sequence[str] | str = ()
    ) -> types.AdapterVersion:
        """Publishes the PEFT checkpoint in a directory of the server's machine."""
        request = requests.import_adapter(name, str(path), aliases)
        with translated():
            answer = self._adapters.ImportAdapter(request, timeout=self._timeout)
        return types.adapter_version(answer)

    def get(self, name: str) -> types.AdapterVersion:
        request = adapters_pb2.GetAdapterRequest(name=requests.resource_name(name))
        with translated():
            answer = self._adapters.GetAdapter(request, timeout=self._timeout)
        return types.adapter_version(answer)

    def list(self, parent: str = "") -> Iterator[types.AdapterVersion]:
        """The newest version of each adapter of a tenant ("acme"), or of everyone's (""); or all
        versions of one adapter ("acme/tickets")."""
        token = ""
        while True:
            request = requests.list_adapters(parent, token)
            with translated():
                page = self._adapters.ListAdapters(request, timeout=self._timeout)
            for version in page.adapters:
                yield types.adapter_version(version)
            token = page.next_page_token
            if not token:
                return

    def delete(self, name: str) -> None:
        """Deletes a version, or ("tenant/adapter") the adapter with all of its versions."""
        request = adapters_pb2.DeleteAdapterRequest(name=requests.resource_name(name))
        with translated():
            self._adapters.DeleteAdapter(request, timeout=self._timeout)

    def load(self, name: str, *, pin: bool = False) -> types.Residency:
        """Brings a version to the device; pinned, it stays until it is unloaded."""
        request = adapters_pb2.LoadAdapterRequest(name=requests.resource_name(name), pin=pin)
        with translated():
            answer = self._adapters.LoadAdapter(request, timeout=self._timeout)
        return types.residency(answer)

    def unload(self, name: str) -> None:
        request = adapters_pb2.UnloadAdapterRequest(name=requests.resource_name(name))
        with translated():
            self._adapters.UnloadAdapter(request, timeout=self._timeout)

    def watch(self, tenant: str = "") -> Iterator[types.Residency]:
        """What is on the device now, then every change, until the iterator is closed."""
        request = adapters_pb2.WatchAdaptersRequest(parent=requests.tenant_parent(tenant))
        call = self._adapters.WatchAdapters(request)
        try:
            with translated():
                for event in call:
                    yield types.residency(event)
        finally:
            call.cancel()
