"""What the clients send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from manylora.errors import InvalidArgument
from manylora.v1 import adapters_pb2, inference_pb2

CHUNK_BYTES = 1 << 20
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # the server decides on .bin

_Message = TypeVar("_Message")
Messages = Sequence[Mapping[str, str]]  # each with "role" and "content"
Pooling = Literal["first", "last", "mean"]
_POOLINGS: Mapping[str, inference_pb2.Pooling] = {
    "first": inference_pb2.POOLING_FIRST,
    "last": inference_pb2.POOLING_LAST,
    "mean": inference_pb2.POOLING_MEAN,
}
Adapter = str | Mapping[str, float]  # a name, or names and weights


def prompt(
    text: str | None,
    messages: Messages | None,
    token_ids: Sequence[int] | None,
    *,
    pair: tuple[str, str] | None = None,
    token_types: Sequence[int] = (),
) -> inference_pb2.Prompt:
    """Raises InvalidArgument unless exactly one of the four is given. token_types: with token_ids
    only."""
    given = {"prompt": text, "messages": messages, "token_ids": token_ids, "pair": pair}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise InvalidArgument(
            "give exactly one of these",
            field="prompt",
            found=" and ".join(names) or "none",
            wanted="prompt, messages, token_ids or pair",
        )
    if token_types and token_ids is None:
        raise InvalidArgument(
            "these go with token_ids", field="token_types", found=names[0], wanted="token_ids"
        )
    if text is not None:
        return _checked(inference_pb2.Prompt, "prompt.text", text=text)
    if pair is not None:
        texts = dict(zip(("first", "second"), pair, strict=True))
        return inference_pb2.Prompt(pair=_checked(inference_pb2.TextPair, "prompt.pair", **texts))
    if token_ids is not None:
        ids = _checked(inference_pb2.TokenIds, "prompt.token_ids", ids=token_ids)
        types = _checked(inference_pb2.TokenIds, "prompt.token_ids.types", types=token_types)
        ids.MergeFrom(types)
        return inference_pb2.Prompt(token_ids=ids)
    chat = inference_pb2.Chat()
    for i, message in enumerate(messages or ()):
        field = f"prompt.chat.messages[{i}]"
        if unknown := message.keys() - {"role", "content"}:
            raise InvalidArgument("unknown keys", field=field, found=", ".join(sorted(unknown)))
        chat.messages.append(_checked(inference_pb2.ChatMessage, field, **message))
    return inference_pb2.Prompt(chat=chat)


def adapter_reference(adapter: Adapter) -> str:
    """The text form of an adapter, or of several with weights: "tenant/a*0.7+tenant/b*0.3".

    Raises InvalidArgument for a mapping of none, which would be answered by the base.
    """
    if isinstance(adapter, str):
        return utf8(adapter, "adapter")
    if not adapter:
        raise InvalidArgument(
            "empty", field="adapter", wanted='names and weights, or "" (the base)'
        )
    text = "+".join(f"{name}*{float(weight)!r}" for name, weight in adapter.items())
    return utf8(text, "adapter")


def pooling(name: Pooling | None) -> inference_pb2.Pooling:
    """Raises InvalidArgument for a name that is none."""
    if name is None:
        return inference_pb2.POOLING_UNSPECIFIED
    if name not in _POOLINGS:
        raise InvalidArgument(
            "no such pooling", field="pooling", found=name, wanted=" or ".join(_POOLINGS)
        )
    return _POOLINGS[name]


def generate(
    prompt: inference_pb2.Prompt,
    adapter: Adapter,
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    seed: int | None,
    repetition_penalty: float | None,
    presence_penalty: float | None,
    frequency_penalty: float | None,
    stop: Sequence[str] | str | None,
    stop_token_ids: Sequence[int] | None,
    ignore_eos: bool | None,
    logprobs: int | None,
) -> inference_pb2.GenerateRequest:
    """None leaves the server's default. Raises InvalidArgument for values that no proto holds."""
    values = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": None if stop is None else _several(stop),
        "stop_token_ids": stop_token_ids,
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
    }
    sampling = inference_pb2.Sampling()
    for name, value in values.items():
        if value is not None:
            field = f"sampling.{name}"
            sampling.MergeFrom(_checked(inference_pb2.Sampling, field, **{name: value}))
    return inference_pb2.GenerateRequest(
        prompt=prompt, adapter=adapter_reference(adapter), sampling=sampling
    )


def _checked(message: Callable[..., _Message], field: str, **values: object) -> _Message:
    """The message, or InvalidArgument for a value that the proto's type cannot hold."""
    try:
        return message(**values)
    except (TypeError, ValueError) as error:
        found = ascii(values.popitem()[1]) if len(values) == 1 else None
        raise InvalidArgument(str(error), field=field, found=found) from None


def utf8(text: str, field: str) -> str:
    """The text; raises InvalidArgument where it has none as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument("not UTF-8", field=field, found=ascii(text)) from None
    return text


def _several(texts: Sequence[str] | str) -> Sequence[str]:
    """A single text is no sequence of its letters."""
    return (texts,) if isinstance(texts, str) else texts


def resource_name(reference: str) -> str:
    """The resource name of "tenant/adapter[@version|:alias]"; the server checks its parts."""
    reference = utf8(reference, "name")
    mark = "@" if "@" in reference else ":"
    name, marked, version = reference.partition(mark)
    tenant, _, adapter = name.partition("/")
    return f"tenants/{tenant}/adapters/{adapter}" + (f"/versions/{version}" if marked else "")


def publish_header(name: str, aliases: Sequence[str] | str) -> adapters_pb2.PublishHeader:
    tenant, _, adapter = utf8(name, "header.adapter_id").partition("/")
    return _checked(
        adapters_pb2.PublishHeader,
        "header.aliases",
        parent=f"tenants/{tenant}",
        adapter_id=adapter,
        aliases=_several(aliases),
    )


def import_adapter(
    name: str, path: str, aliases: Sequence[str] | str
) -> adapters_pb2.ImportAdapterRequest:
    tenant, _, adapter = utf8(name, "adapter_id").partition("/")
    return _checked(
        adapters_pb2.ImportAdapterRequest,
        "path or aliases",
        parent=f"tenants/{tenant}",
        adapter_id=adapter,
        path=path,
        aliases=_several(aliases),
    )


def list_adapters(of: str, page_token: str) -> adapters_pb2.ListAdaptersRequest:
    parent = resource_name(of) if "/" in of else tenant_parent(of)
    return adapters_pb2.ListAdaptersRequest(parent=parent, page_token=page_token)


def tenant_parent(tenant: str) -> str:
    return f"tenants/{utf8(tenant, 'tenant')}" if tenant else ""


def upload(
    name: str, directory: Path, aliases: Sequence[str] | str
) -> Iterator[adapters_pb2.PublishAdapterRequest]:
    """A checkpoint directory as PublishAdapter's messages.

    Raises InvalidArgument, at once, if a file of it cannot be read.
    """
    weights = next((n for n in WEIGHTS_FILES if (directory / n).exists()), WEIGHTS_FILES[0])
    files: dict[str, BinaryIO] = {}
    with ExitStack() as opened:
        for file in (CONFIG_FILE, weights):
            try:
                files[file] = opened.enter_context((directory / file).open("rb"))
            except OSError as error:
                raise InvalidArgument(
                    f"cannot read the checkpoint: {error.strerror}", field=file, found=directory
                ) from None
        return _messages(publish_header(name, aliases), files, opened.pop_all())


def _messages(
    header: adapters_pb2.PublishHeader, files: Mapping[str, BinaryIO], opened: ExitStack
) -> Iterator[adapters_pb2.PublishAdapterRequest]:
    with opened:
        yield adapters_pb2.PublishAdapterRequest(header=header)
        for path, file in files.items():
            while data := file.read(CHUNK_BYTES):
                chunk = adapters_pb2.FileChunk(path=path, data=data)
                yield adapters_pb2.PublishAdapterRequest(chunk=chunk)


def limit(asked: float | None, own: float | None) -> float | None:
    """Seconds of a call: those asked for, 0 too, else the client's own."""
    return own if asked is None else asked
