"""Both clients against a real server: the same tests, the asynchronous client driven to match."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import peft
import pytest
from manylora_testing.classifiers import make_task_adapter, peft_answer
from manylora_testing.served import Served, eventually

from manylora.client import AsyncClient, Client, ModelInfo
from manylora.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)

PROMPT = "the printer in the hall"
METHODS = (
    "generate",
    "stream",
    "classify",
    "classify_tokens",
    "embed",
    "tokenize",
    "model_info",
    "publish",
    "import_adapter",
    "get",
    "list",
    "delete",
    "load",
    "unload",
    "watch",
)


class Blocking:
    """An AsyncClient whose methods block, and whose iterators are plain ones."""

    def __init__(self, target: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(self._connect(target, **options))

    @staticmethod
    async def _connect(target: str, **options: Any) -> AsyncClient:
        return AsyncClient(target, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if inspect.isasyncgen(result):
                return self._iterate(result)
            return self._loop.run_until_complete(result)

        return call

    def _iterate(self, iterator: AsyncIterator[Any]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._loop.run_until_complete(anext(iterator))
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run_until_complete(iterator.aclose())  # type: ignore[attr-defined]

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


@pytest.fixture(params=[Client, Blocking], ids=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def connect(server: Served, **options: Any) -> Any:
        made.append(request.param(server.target, **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()


@pytest.fixture
def client(connect: Callable[..., Any], server: Served) -> Any:
    return connect(server)


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    kind = "sync" if "[Client" in request.node.name else "async"
    return f"{kind}-{request.node.originalname.replace('_', '-')}"[:63]


def test_several_adapters_at_once(client: Any, tenant: str, adapter_dirs: list[Path]) -> None:
    for i in range(2):
        client.publish(f"{tenant}/s{i}", adapter_dirs[i])
    weights = {f"{tenant}/s0": 0.7, f"{tenant}/s1@1": -1}
    text = f"{tenant}/s0@1*0.7+{tenant}/s1@1*-1.0"
    whole = client.generate(PROMPT, adapter=weights, max_tokens=8, ignore_eos=True)
    parts = list(client.stream(PROMPT, adapter=weights, max_tokens=8, ignore_eos=True))
    again = client.generate(PROMPT, adapter=text, max_tokens=8, ignore_eos=True)
    assert whole.adapter == again.adapter == parts[0].adapter == text
    assert whole.token_ids == again.token_ids == sum((part.token_ids for part in parts), ())
    with pytest.raises(InvalidArgument) as caught:
        client.generate(PROMPT, adapter={f"{tenant}/s0": float("nan")})
    assert caught.value.field == "adapter (weight)"
    with pytest.raises(InvalidArgument) as caught:
        client.generate(PROMPT, adapter={})  # no adapter is "", so as not to get the base unasked
    assert caught.value.field == "adapter"


def test_generate_and_stream(client: Any, tenant: str, adapter_dirs: list[Path]) -> None:
    client.publish(f"{tenant}/a", adapter_dirs[0], aliases=["prod"])
    for adapter in ("", f"{tenant}/a:prod"):
        whole = client.generate(PROMPT, adapter=adapter, max_tokens=20, ignore_eos=True, logprobs=1)
        parts = list(
            client.stream(PROMPT, adapter=adapter, max_tokens=20, ignore_eos=True, logprobs=1)
        )
        assert "".join(part.text for part in parts) == whole.text
        assert sum((part.token_ids for part in parts), ()) == whole.token_ids
        assert sum((part.logprobs for part in parts), ()) == whole.logprobs
        assert {part.adapter for part in parts} == {whole.adapter}
        assert whole.adapter == (f"{tenant}/a@1" if adapter else "")
        assert whole.finish_reason == parts[-1].finish_reason == "length"
        assert whole.usage.completion_tokens == parts[-1].usage.completion_tokens == 20
        assert {part.finish_reason for part in parts[:-1]} == {None}
        assert [entry.chosen.token_id for entry in whole.logprobs] == list(whole.token_ids)
        assert all(entry.chosen == entry.top[0] for entry in whole.logprobs)


def test_the_three_forms_of_a_prompt(client: Any) -> None:
    tokens = client.tokenize(PROMPT)
    by_text = client.generate(PROMPT, max_tokens=5, ignore_eos=True)
    by_ids = client.generate(token_ids=tokens, max_tokens=5, ignore_eos=True)
    assert by_ids.token_ids == by_text.token_ids
    messages = [{"role": "user", "content": PROMPT}]
    chat_tokens = client.tokenize(messages=messages)
    assert len(chat_tokens) > len(tokens)
    by_chat = client.generate(messages=messages, max_tokens=5, ignore_eos=True)
    by_ids = client.generate(token_ids=chat_tokens, max_tokens=5, ignore_eos=True)
    assert by_ids.token_ids == by_chat.token_ids
    assert by_chat.usage.prompt_tokens == len(chat_tokens)


def test_every_sampling_argument_arrives(client: Any) -> None:
    """Each one either changes the answer or is refused by its name."""

    def ids(**sampling: Any) -> tuple[int, ...]:
        answer = client.generate(PROMPT, max_tokens=24, ignore_eos=True, **sampling)
        return tuple(answer.token_ids)

    greedy = ids()
    wild = ids(temperature=50.0, seed=1)
    assert wild != greedy and wild != ids(temperature=50.0, seed=2)
    for name, value in {"top_k": 1, "top_p": 1e-9, "min_p": 1.0}.items():
        assert ids(temperature=50.0, seed=1, **{name: value}) == greedy
    for name in ("presence_penalty", "frequency_penalty"):
        assert ids(**{name: 2.0}) != greedy
    assert ids(repetition_penalty=100.0) != greedy
    assert len(client.generate(PROMPT, max_tokens=3, ignore_eos=True).token_ids) == 3
    stopped = client.generate(PROMPT, max_tokens=24, ignore_eos=True, stop_token_ids=[greedy[4]])
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= 5
    text = client.generate(PROMPT, max_tokens=24, ignore_eos=True).text
    for stop in (text[3:5], [text[3:5]]):
        stopped = client.generate(PROMPT, max_tokens=24, ignore_eos=True, stop=stop)
        assert stopped.text == text[: text.index(text[3:5])]
    for name, value in {"temperature": -1.0, "logprobs": 99, "top_k": 2**40, "seed": -1.5}.items():
        with pytest.raises(InvalidArgument) as caught:
            ids(**{name: value})
        assert caught.value.field == f"sampling.{name}"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "token_ids": [1]}, "prompt"),
        ({"prompt": "x", "messages": []}, "prompt"),
        ({"prompt": ""}, "prompt.text"),
        ({"prompt": 5}, "prompt.text"),
        ({"prompt": "\ud800"}, "prompt.text"),
        ({"token_ids": []}, "prompt.token_ids"),
        ({"token_ids": [2**40]}, "prompt.token_ids"),
        ({"messages": []}, "prompt.chat"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "prompt.chat.messages[0]"),
        ({"messages": [{"content": "hi"}]}, "prompt.chat.messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "prompt.chat.messages"),
    ],
    ids=ascii,
)
def test_bad_prompts(client: Any, prompt: dict[str, Any], field: str) -> None:
    for call in (client.generate, lambda **prompt: list(client.stream(**prompt))):
        with pytest.raises(InvalidArgument) as caught:
            call(**prompt)
        assert caught.value.field == field


@pytest.fixture(scope="session")
def classifiers(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    config = {"r": 2, "target_modules": ["q_proj"]}
    return {
        task: make_task_adapter(base_model, root / task, task, peft.LoraConfig(**config))
        for task in ("SEQ_CLS", "TOKEN_CLS")
    }


@pytest.mark.filterwarnings("ignore")
def test_classes(client: Any, tenant: str, base_model: Path, classifiers: dict[str, Path]) -> None:
    for task, directory in classifiers.items():
        client.publish(f"{tenant}/{task.lower().replace('_', '-')}", directory)
    ids = client.tokenize(PROMPT)
    right = peft_answer(base_model, classifiers["SEQ_CLS"], "SEQ_CLS", ids)
    for prompt in ({"prompt": PROMPT}, {"token_ids": ids}):
        found = client.classify(**prompt, adapter=f"{tenant}/seq-cls")
        assert found.logits == pytest.approx(right.tolist(), abs=1e-4)
        assert found.scores == pytest.approx(right.softmax(0).tolist(), abs=1e-4)
        assert found.label == f"LABEL_{int(right.argmax())}" and found.problem == "single_label"
        assert (found.adapter, found.usage.prompt_tokens) == (f"{tenant}/seq-cls@1", len(ids))
    answer = client.classify_tokens(PROMPT, adapter=f"{tenant}/token-cls")
    right = peft_answer(base_model, classifiers["TOKEN_CLS"], "TOKEN_CLS", ids)
    for token, row in zip(answer.tokens, right, strict=True):
        assert token.logits == pytest.approx(row.tolist(), abs=1e-4)
        assert token.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert tuple(token.token_id for token in answer.tokens) == ids
    spans = [token.span for token in answer.tokens if token.span is not None]
    assert "".join(PROMPT[start:end] for start, end in spans) == PROMPT
    assert len(spans) == len(ids) - 1 and answer.adapter == f"{tenant}/token-cls@1"
    pair = client.classify_tokens(pair=("a", PROMPT), adapter=f"{tenant}/token-cls")
    assert {token.text for token in pair.tokens if token.span} == {0, 1}
    assert tuple(token.token_id for token in pair.tokens) == client.tokenize(pair=("a", PROMPT))


@pytest.mark.filterwarnings("ignore")
def test_embeddings(client: Any, base_model: Path) -> None:
    ids = client.tokenize(PROMPT)
    rows = peft_answer(base_model, None, "FEATURE_EXTRACTION", ids)
    wanted = {None: rows[-1], "first": rows[0], "last": rows[-1], "mean": rows.mean(dim=0)}
    for pooling, right in wanted.items():
        found = client.embed(PROMPT, pooling=pooling)
        assert found.embedding == pytest.approx(right.tolist(), abs=1e-4)
        assert (found.adapter, found.usage.prompt_tokens) == ("", len(ids))
    found = client.embed(token_ids=ids, normalize=True)
    assert found.embedding == pytest.approx((rows[-1] / rows[-1].norm()).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "pair": ("x", "y")}, "prompt"),
        ({"pair": ("x", "")}, "prompt.pair.second"),
        ({"prompt": "x", "token_types": [0]}, "token_types"),
        ({"token_ids": [5], "token_types": [0]}, "prompt.token_ids.types"),
        ({"token_ids": [5], "token_types": [2**40]}, "prompt.token_ids.types"),
    ],
    ids=ascii,
)
def test_bad_prompts_to_look_at(client: Any, arguments: dict[str, Any], field: str) -> None:
    for call in (client.classify, client.classify_tokens, client.embed):
        with pytest.raises(InvalidArgument) as caught:
            call(**arguments)
        assert caught.value.field == field
    with pytest.raises(InvalidArgument) as caught:
        client.embed("x", pooling="cls")
    assert caught.value.field == "pooling"


def test_model_info(client: Any, server: Served) -> None:
    info, wanted = client.model_info(), server.engine.info
    names = ModelInfo.__dataclass_fields__
    assert {n: getattr(info, n) for n in names} == {n: getattr(wanted, n) for n in names}


def test_adapters(client: Any, tenant: str, adapter_dirs: list[Path]) -> None:
    name = f"{tenant}/a"
    first = client.publish(name, str(adapter_dirs[0]), aliases="prod")
    assert (first.adapter, first.version, first.peft_type, first.rank) == (
        f"{name}@1",
        1,
        "LORA",
        2,
    )
    assert first.aliases == ("prod",) and len(first.digest) == 64
    assert first.size_bytes > 1000 and datetime.now(UTC) - first.created < timedelta(hours=1)
    second = client.import_adapter(name, adapter_dirs[1], aliases=["canary"])
    assert second.adapter == f"{name}@2"
    assert client.get(name).adapter == client.get(f"{name}:canary").adapter == f"{name}@2"
    assert client.get(f"{name}@1").aliases == ("prod",)
    client.publish(f"{tenant}/b", adapter_dirs[0])
    assert [v.adapter for v in client.list(tenant)] == [f"{name}@2", f"{tenant}/b@1"]
    assert [v.adapter for v in client.list(name)] == [f"{name}@2", f"{name}@1"]
    assert {f"{name}@2", f"{tenant}/b@1"} <= {v.adapter for v in client.list()}

    with pytest.raises(NotFound):
        client.unload(f"{name}:canary")
    watch = client.watch()
    loaded = client.load(f"{name}:canary", pin=True)
    assert loaded.adapter == f"{name}@2" and loaded.digest == second.digest
    assert (loaded.state, loaded.pinned, loaded.in_use) == ("resident", True, 0)
    assert loaded.size_bytes > 0 and loaded.load_seconds > 0 and loaded.error == ""
    assert client.get(name).residency == loaded
    assert any(event == loaded for event in watch)
    watch.close()
    client.unload(name)
    assert client.get(name).residency is None

    client.delete(f"{tenant}/b")
    with pytest.raises(NotFound) as missing:
        client.generate(PROMPT, adapter=f"{tenant}/b")
    assert (missing.value.field, missing.value.found) == ("adapter", f"{tenant}/b")
    client.delete(name)
    assert list(client.list(tenant)) == []


@pytest.fixture(scope="session")
def many(server: Served, adapter_dirs: list[Path]) -> str:
    """A tenant with more adapters than a page's 100."""
    for i in range(105):
        server.store.publish(f"many/a{i:03}", adapter_dirs[0])
    return "many"


def test_a_list_has_all_pages(client: Any, many: str) -> None:
    assert [v.adapter for v in client.list(many)] == [f"{many}/a{i:03}@1" for i in range(105)]


def test_uploads_of_many_chunks(
    client: Any, tenant: str, adapter_dirs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = client.publish(f"{tenant}/whole", adapter_dirs[1])
    monkeypatch.setattr("manylora.client.requests.CHUNK_BYTES", 1000)
    assert client.publish(f"{tenant}/pieces", adapter_dirs[1]).digest == whole.digest


def test_refused_adapters(
    client: Any, tenant: str, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.publish(f"{tenant}/a", tmp_path)
    assert caught.value.field == "adapter_config.json"
    (tmp_path / "adapter_config.json").write_bytes(
        (adapter_dirs[0] / "adapter_config.json").read_bytes()
    )
    with pytest.raises(InvalidArgument) as caught:
        client.publish(f"{tenant}/a", tmp_path)
    assert caught.value.field == "adapter_model.safetensors"
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(InvalidArgument, match="pickled"):
        client.publish(f"{tenant}/a", tmp_path)
    for name in ("", "acme", "acme/", "acme/a/b", "../a", "acme/a@1", "x" * 10_240, "a/\udcff"):
        with pytest.raises(InvalidArgument) as caught:
            client.publish(name, adapter_dirs[0])
        assert (caught.value.field or "").split(".")[0] == "header"
        if "@" not in name:
            with pytest.raises(InvalidArgument) as caught:
                client.get(name)
            assert caught.value.field.partition(" ")[0] == "name"
    with pytest.raises(PermissionDenied):
        client.import_adapter(f"{tenant}/a", tmp_path)
    client.publish(f"{tenant}/a", adapter_dirs[0], aliases=["prod"])
    client.publish(f"{tenant}/a", adapter_dirs[1])
    with pytest.raises(FailedPrecondition) as refused:
        client.delete(f"{tenant}/a@1")
    assert refused.value.field == "name" and "prod" in (refused.value.found or "")


def test_closing_a_stream_stops_the_work(client: Any, server: Served) -> None:
    stream = client.stream(PROMPT, max_tokens=4000, ignore_eos=True)
    next(stream)
    assert not server.idle
    stream.close()
    eventually(lambda: server.idle)


def test_timeouts(connect: Callable[..., Any], server: Served) -> None:
    client = connect(server)
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, max_tokens=4000, ignore_eos=True, timeout=0.1)
    with pytest.raises(DeadlineExceeded):
        list(client.stream(PROMPT, max_tokens=4000, ignore_eos=True, timeout=0.1))
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, timeout=0)
    impatient = connect(server, timeout=0.1)
    with pytest.raises(DeadlineExceeded):
        impatient.generate(PROMPT, max_tokens=4000, ignore_eos=True)
    eventually(lambda: server.idle)


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_nobody_there(kind: Callable[..., Any]) -> None:
    client = kind("127.0.0.1:1")
    with pytest.raises(Unavailable):
        client.model_info()
    client.close()


def test_an_untrusted_server(server: Served) -> None:
    """The server speaks no TLS: a client that was told to must not fall back."""
    with Client(server.target, root_certificates=b"") as client, pytest.raises(Unavailable):
        client.model_info()


def test_context_managers(server: Served) -> None:
    with Client(server.target) as client:
        client.model_info()

    async def main() -> None:
        async with AsyncClient(server.target) as client:
            await client.model_info()

    asyncio.run(main())


async def test_a_cancelled_publish_leaves_nothing(
    server: Served, adapter_dirs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.client.requests.CHUNK_BYTES", 1)  # it takes a while
    staging = server.root / "staging"
    async with AsyncClient(server.target) as client:
        publishing = asyncio.create_task(client.publish("cancelled/a", adapter_dirs[0]))
        await asyncio.to_thread(eventually, lambda: any(staging.iterdir()))
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        await asyncio.to_thread(eventually, lambda: not any(staging.iterdir()))
        assert [version async for version in client.list("cancelled")] == []


async def test_many_streams_at_once(server: Served) -> None:
    async def stream(client: AsyncClient, i: int) -> list[str]:
        prompt = f"number {i}"
        return [c.text async for c in client.stream(prompt, max_tokens=20, ignore_eos=True)]

    async with AsyncClient(server.target) as client:
        alone = [
            await client.generate(f"number {i}", max_tokens=20, ignore_eos=True) for i in range(16)
        ]
        together = await asyncio.gather(*(stream(client, i) for i in range(16)))
    assert ["".join(texts) for texts in together] == [answer.text for answer in alone]


def test_the_clients_are_alike() -> None:
    for name in METHODS:
        blocking, awaited = (
            inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient)
        )
        assert blocking.parameters == awaited.parameters
        assert str(awaited.return_annotation).replace("AsyncIterator", "Iterator") == str(
            blocking.return_annotation
        )


def test_the_client_needs_little() -> None:
    code = (
        "import sys, manylora.client\n"
        "heavy = {'torch', 'numpy', 'transformers', 'manylora.server', 'manylora.kernels'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
