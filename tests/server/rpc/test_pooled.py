"""Classify, ClassifyTokens and Embed over a real connection equal transformers + peft."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import peft
import pytest
import torch
from manylora_testing.classifiers import make_task_adapter, peft_answer, tiny_encoder
from manylora_testing.oracle import peft_greedy
from manylora_testing.served import Served, eventually, served
from manylora_testing.stubs import Stubs, refusal, refused_field
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer
from transformers import AutoTokenizer

from manylora.server.engine.settings import EngineSettings
from manylora.server.engine.types import AdapterKey
from manylora.v1 import inference_pb2 as pb

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
TARGETS = ["query", "value", "dense"]
TEXTS = ("the printer in the hall", "naïve café, 東京 😀")


@dataclass(frozen=True)
class World:
    """A served encoder. adapters: published as tenant "t", by name; their tasks begin it."""

    base: Path
    adapters: Mapping[str, Path]
    server: Served
    stubs: Stubs


def configs() -> dict[str, tuple[peft.PeftConfig, int]]:
    """Name → the adapter's config, and how many labels it has."""
    ia3 = {"target_modules": ["key", "value"], "feedforward_modules": []}
    return {
        "SEQ_CLS-lora": (peft.LoraConfig(r=4, target_modules=TARGETS), 3),
        "SEQ_CLS-dora": (peft.LoraConfig(r=3, use_dora=True, target_modules=TARGETS), 5),
        "SEQ_CLS-ia3": (peft.IA3Config(**ia3), 3),
        "SEQ_CLS-many": (peft.LoraConfig(r=2, target_modules=["value"]), 4),
        "SEQ_CLS-number": (peft.LoraConfig(r=2, target_modules=["query"]), 1),
        "SEQ_CLS-prompt": (peft.PromptTuningConfig(num_virtual_tokens=5), 3),
        "TOKEN_CLS-lora": (peft.LoraConfig(r=4, target_modules=TARGETS), 3),
        "FEATURE_EXTRACTION-prompt": (peft.PromptTuningConfig(num_virtual_tokens=4), 3),
        "FEATURE_EXTRACTION-lora": (peft.LoraConfig(r=4, target_modules=TARGETS), 3),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("encoder")
    base = tiny_tokenizer(tiny_encoder("bert", root / "base"), token_types=True)
    made = {
        name: make_task_adapter(base, root / name, name.partition("-")[0], config, labels)
        for name, (config, labels) in configs().items()
    }
    _say(made["SEQ_CLS-many"], problem_type="multi_label_classification")
    _say(made["SEQ_CLS-lora"], id2label={"0": "no", "1": "maybe", "2": "yes"})
    settings = EngineSettings(model=base, kv_cache_bytes=0, adapter_bytes=4 << 20)
    with served(settings, root / "store") as server:
        stubs = Stubs(server.target)
        for name, directory in made.items():
            stubs.publish("tenants/t", name.lower().replace("_", "-"), directory)
        yield World(base, made, server, stubs)
        stubs.channel.close()


def _say(adapter: Path, **words: Any) -> None:
    """Puts into the adapter's config what transformers has in a model's."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **words}))


def reference(name: str) -> str:
    return f"t/{name.lower().replace('_', '-')}" if name else ""


def ids_prompt(ids: Sequence[int], types: Sequence[int] = ()) -> pb.Prompt:
    return pb.Prompt(token_ids=pb.TokenIds(ids=ids, types=types))


def some_ids(seed: int, length: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return [int(i) for i in generator.integers(3, TOKENIZER_VOCAB, length)]


def gap(found: Sequence[float], right: torch.Tensor) -> float:
    assert float(right.abs().max()) > 0.05
    return float((torch.tensor(list(found)) - right).abs().max())


def test_adapters_of_all_tasks_in_one_batch(world: World) -> None:
    wanted = [
        (name, some_ids(i, 3 + 7 * i)) for i, name in enumerate(world.adapters) for _ in range(3)
    ]
    for name in world.adapters:
        world.server.run(_load(world.server, reference(name)))
    steps = _sample(world, "manylora_step_sequences_count")
    requests = _sample(world, "manylora_step_sequences_sum")
    calls = [_begin(world.stubs, name, ids) for name, ids in wanted]
    answers = [call.result() for call in calls]
    steps = _sample(world, "manylora_step_sequences_count") - steps
    assert steps < _sample(world, "manylora_step_sequences_sum") - requests == len(wanted)
    for (name, ids), answer in zip(wanted, answers, strict=True):
        task = name.partition("-")[0]
        right = peft_answer(world.base, world.adapters[name], task, ids)
        if task == "FEATURE_EXTRACTION":
            assert gap(answer.embedding, right.mean(dim=0)) < TOLERANCE
        elif task == "TOKEN_CLS":
            for token, row in zip(answer.tokens, right, strict=True):
                assert gap(token.scores.logits, row) < TOLERANCE
            assert [token.token_id for token in answer.tokens] == ids
        else:
            assert gap(answer.scores.logits, right) < TOLERANCE
        assert answer.adapter == f"{reference(name)}@1"
        assert answer.usage == pb.Usage(prompt_tokens=len(ids))


async def _load(server: Served, name: str) -> None:
    version = server.store.resolve(name)
    await server.engine.load_adapter(AdapterKey(version.digest, version.label), pin=False)


def _begin(stubs: Stubs, name: str, ids: Sequence[int]) -> Any:
    prompt, adapter = ids_prompt(ids), reference(name)
    match name.partition("-")[0]:
        case "SEQ_CLS":
            request: Any = pb.ClassifyRequest(adapter=adapter, prompt=prompt)
            return stubs.inference.Classify.future(request)
        case "TOKEN_CLS":
            request = pb.ClassifyTokensRequest(adapter=adapter, prompt=prompt)
            return stubs.inference.ClassifyTokens.future(request)
        case _:
            request = pb.EmbedRequest(adapter=adapter, prompt=prompt)
            return stubs.inference.Embed.future(request)


def _sample(world: World, name: str, **labels: str) -> float:
    return world.server.observer.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("name", "labels", "problem"),
    [
        ("SEQ_CLS-lora", ["no", "maybe", "yes"], pb.PROBLEM_SINGLE_LABEL),
        ("SEQ_CLS-dora", [f"LABEL_{i}" for i in range(5)], pb.PROBLEM_SINGLE_LABEL),
        ("SEQ_CLS-many", [f"LABEL_{i}" for i in range(4)], pb.PROBLEM_MULTI_LABEL),
        ("SEQ_CLS-number", ["LABEL_0"], pb.PROBLEM_REGRESSION),
    ],
)
def test_labels_and_scores(world: World, name: str, labels: list[str], problem: int) -> None:
    request = pb.ClassifyRequest(adapter=reference(name), prompt=pb.Prompt(text=TEXTS[0]))
    answer = world.stubs.inference.Classify(request)
    assert (list(answer.labels), answer.problem) == (labels, problem)
    ids = AutoTokenizer.from_pretrained(world.base)(TEXTS[0])["input_ids"]
    logits = peft_answer(world.base, world.adapters[name], "SEQ_CLS", ids)
    right = {
        pb.PROBLEM_SINGLE_LABEL: lambda: logits.softmax(0),
        pb.PROBLEM_MULTI_LABEL: logits.sigmoid,
        pb.PROBLEM_REGRESSION: lambda: logits,
    }[problem]()
    assert gap(answer.scores.scores, right) < TOLERANCE
    assert gap(answer.scores.logits, logits) < TOLERANCE


@pytest.mark.parametrize("name", ["SEQ_CLS-lora", "SEQ_CLS-prompt"])
def test_pairs_and_token_types(world: World, name: str) -> None:
    """The types matter, and are what the tokenizer says; or what the caller says."""
    encoded = AutoTokenizer.from_pretrained(world.base)(*TEXTS)
    ids, types = encoded["input_ids"], encoded["token_type_ids"]
    assert set(types) == {0, 1}
    adapter = world.adapters[name]
    right = peft_answer(world.base, adapter, "SEQ_CLS", ids, types)
    assert float((peft_answer(world.base, adapter, "SEQ_CLS", ids) - right).abs().max()) > 0.01
    pair = pb.Prompt(pair=pb.TextPair(first=TEXTS[0], second=TEXTS[1]))
    for prompt in (pair, ids_prompt(ids, types)):
        request = pb.ClassifyRequest(adapter=reference(name), prompt=prompt)
        answer = world.stubs.inference.Classify(request)
        assert gap(answer.scores.logits, right) < TOLERANCE
    tokens = world.stubs.inference.Tokenize(pb.TokenizeRequest(prompt=pair))
    assert (list(tokens.token_ids), list(tokens.types)) == (ids, types)


@pytest.mark.parametrize("name", ["FEATURE_EXTRACTION-lora", "FEATURE_EXTRACTION-prompt"])
def test_token_types_of_embeddings(world: World, name: str) -> None:
    """Behind virtual tokens peft leaves them out."""
    ids, types = some_ids(3, 12), [0] * 5 + [1] * 7
    adapter = world.adapters[name]
    right = peft_answer(world.base, adapter, "FEATURE_EXTRACTION", ids, types)
    plain = peft_answer(world.base, adapter, "FEATURE_EXTRACTION", ids)
    assert torch.equal(right, plain) is (name == "FEATURE_EXTRACTION-prompt")
    request = pb.EmbedRequest(adapter=reference(name), prompt=ids_prompt(ids, types))
    answer = world.stubs.inference.Embed(request)
    assert gap(answer.embedding, right.mean(dim=0)) < TOLERANCE


def test_spans(world: World) -> None:
    def spans(prompt: pb.Prompt) -> list[tuple[int, int, int] | None]:
        request = pb.ClassifyTokensRequest(adapter=reference("TOKEN_CLS-lora"), prompt=prompt)
        tokens = world.stubs.inference.ClassifyTokens(request).tokens
        return [
            (t.span.start, t.span.end, t.span.text) if t.HasField("span") else None for t in tokens
        ]

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    alone = [tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for text in TEXTS]
    for text, offsets in zip(TEXTS, alone, strict=True):
        found = spans(pb.Prompt(text=text))
        assert found == [None, *((start, end, 0) for start, end in offsets[1:])]
        assert {i for start, end, _ in found[1:] for i in range(start, end)} == set(
            range(len(text))
        )
    found = spans(pb.Prompt(pair=pb.TextPair(first=TEXTS[0], second=TEXTS[1])))
    assert [span for span in found if span] == [
        (start, end, i) for i in range(2) for start, end in alone[i][1:]
    ]
    assert spans(ids_prompt([5, 6, 7])) == [None] * 3


def test_embeddings(world: World) -> None:
    ids = some_ids(1, 23)
    for name in ("", "FEATURE_EXTRACTION-lora"):
        rows = peft_answer(world.base, world.adapters.get(name), "FEATURE_EXTRACTION", ids)
        wanted = {
            pb.POOLING_UNSPECIFIED: rows.mean(dim=0),
            pb.POOLING_FIRST: rows[0],
            pb.POOLING_LAST: rows[-1],
            pb.POOLING_MEAN: rows.mean(dim=0),
        }
        for (pooling, right), normalize in itertools.product(wanted.items(), (False, True)):
            answer = world.stubs.inference.Embed(
                pb.EmbedRequest(
                    adapter=reference(name),
                    prompt=ids_prompt(ids),
                    pooling=pooling,
                    normalize=normalize,
                )
            )
            length = float(right.norm()) if normalize else 1.0
            assert gap(answer.embedding, right / length) < TOLERANCE
            assert answer.adapter == (f"{reference(name)}@1" if name else "")


def test_an_encoder_that_peft_wrapped_without_a_task(world: World, tmp_path: Path) -> None:
    made = world.adapters["FEATURE_EXTRACTION-lora"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    _say(tmp_path, task_type=None)
    world.stubs.publish("tenants/t", "no-task", tmp_path)
    ids = some_ids(2, 9)
    request = pb.EmbedRequest(adapter="t/no-task", prompt=ids_prompt(ids))
    rows = peft_answer(world.base, tmp_path, "FEATURE_EXTRACTION", ids)
    assert gap(world.stubs.inference.Embed(request).embedding, rows.mean(dim=0)) < TOLERANCE


BAD, UNFIT = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
FIVE = ids_prompt([5])
HALF_PAIR = pb.Prompt(pair=pb.TextPair(first="x"))
REFUSED: list[tuple[str, Any, str, str]] = [
    ("Classify", pb.ClassifyRequest(), "prompt", BAD),
    ("Classify", pb.ClassifyRequest(prompt=HALF_PAIR), "prompt.pair.second", BAD),
    ("Classify", pb.ClassifyRequest(prompt=ids_prompt([5], [0, 0])), "prompt.token_ids.types", BAD),
    ("Embed", pb.EmbedRequest(prompt=ids_prompt([5], [2])), "prompt.token_ids.types", BAD),
    ("Embed", pb.EmbedRequest(prompt=ids_prompt([5], [-1])), "prompt.token_ids.types", BAD),
    ("Embed", pb.EmbedRequest(prompt=ids_prompt([5] * 129)), "prompt", BAD),
    ("Embed", pb.EmbedRequest(prompt=FIVE, pooling=9), "pooling", BAD),
    ("Embed", pb.EmbedRequest(prompt=FIVE, adapter="a b"), "adapter", BAD),
    ("Embed", pb.EmbedRequest(prompt=FIVE, adapter="t/none"), "adapter", "NOT_FOUND"),
    ("Classify", pb.ClassifyRequest(prompt=FIVE), "adapter", UNFIT),
    ("Classify", pb.ClassifyRequest(prompt=FIVE, adapter="t/token-cls-lora"), "adapter", UNFIT),
    (
        "ClassifyTokens",
        pb.ClassifyTokensRequest(prompt=FIVE, adapter="t/seq-cls-ia3"),
        "adapter",
        UNFIT,
    ),
    ("Generate", pb.GenerateRequest(prompt=FIVE), "model", UNFIT),
]


@pytest.mark.parametrize(("method", "request_", "field", "code"), REFUSED)
def test_refused(world: World, method: str, request_: Any, field: str, code: str) -> None:
    call = getattr(world.stubs.inference, method)
    assert refused_field(lambda: call(request_), code) == field


def test_an_adapter_without_a_head_on_a_base_without_one(world: World, tmp_path: Path) -> None:
    """peft saves none with this method, and makes up one when it loads."""
    config = peft.TrainableTokensConfig(token_indices=[4, 5])
    adapter = make_task_adapter(world.base, tmp_path / "tokens", "SEQ_CLS", config)
    refused = lambda: world.stubs.publish("tenants/t", "headless", adapter)  # noqa: E731
    assert refused_field(refused, UNFIT) == "adapter_model.safetensors"


def test_model_info(world: World) -> None:
    info = world.stubs.inference.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.generates, info.token_types) == (False, 2)
    assert set(info.tasks) == {"SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"}


def test_deadlines_and_cancelling(
    world: World, tmp_path: Path, connect: Callable[[Served], Stubs]
) -> None:
    """Both end a request whose adapter does not come; metrics tell of it."""
    gate = threading.Event()
    settings = EngineSettings(model=world.base, kv_cache_bytes=0, adapter_bytes=4 << 20)
    with served(settings, tmp_path / "store", hold_loads=gate) as server:
        stubs = connect(server)
        stubs.publish("tenants/t", "a", world.adapters["SEQ_CLS-lora"])
        request = pb.ClassifyRequest(adapter="t/a", prompt=ids_prompt([5]))

        def ended(outcome: str) -> float:
            name = "manylora_requests_total"
            return server.observer.registry.get_sample_value(name, {"outcome": outcome}) or 0.0

        code, _ = refusal(lambda: stubs.inference.Classify(request, timeout=0.2))
        assert code == "DEADLINE_EXCEEDED"
        eventually(lambda: ended("deadline") + ended("cancelled") == 1)
        call = stubs.inference.Classify.future(request)
        eventually(lambda: server.engine.stats().waiting == 1)
        call.cancel()
        eventually(lambda: ended("deadline") + ended("cancelled") == 2)
        assert server.idle
        gate.set()
        assert stubs.inference.Classify(request).scores.logits
        assert ended("pooled") == 1


def test_a_decoder_beside_generation(
    stubs: Stubs, server: Served, tenant: str, base_model: Path, tmp_path: Path
) -> None:
    adapters = {
        task: make_task_adapter(
            base_model, tmp_path / task, task, peft.LoraConfig(target_modules=["q_proj", "v_proj"])
        )
        for task in ("SEQ_CLS", "TOKEN_CLS")
    }
    for task, directory in adapters.items():
        stubs.publish(f"tenants/{tenant}", task[:3].lower(), directory)
    ids = some_ids(4, 30)
    sampling = pb.Sampling(max_tokens=12, ignore_eos=True)
    generated = stubs.inference.Generate.future(
        pb.GenerateRequest(prompt=ids_prompt(ids), sampling=sampling)
    )
    classified = stubs.inference.Classify(
        pb.ClassifyRequest(adapter=f"{tenant}/seq", prompt=ids_prompt(ids))
    )
    tokens = stubs.inference.ClassifyTokens(
        pb.ClassifyTokensRequest(adapter=f"{tenant}/tok", prompt=pb.Prompt(text=TEXTS[1]))
    ).tokens
    embedded = stubs.inference.Embed(pb.EmbedRequest(prompt=ids_prompt(ids)))
    assert list(generated.result().token_ids) == peft_greedy(base_model, None, ids, 12)
    right = peft_answer(base_model, adapters["SEQ_CLS"], "SEQ_CLS", ids)
    assert gap(classified.scores.logits, right) < TOLERANCE
    right = peft_answer(
        base_model, adapters["TOKEN_CLS"], "TOKEN_CLS", [token.token_id for token in tokens]
    )
    for token, row in zip(tokens, right, strict=True):
        assert gap(token.scores.logits, row) < TOLERANCE
    rows = peft_answer(base_model, None, "FEATURE_EXTRACTION", ids)
    assert gap(embedded.embedding, rows[-1]) < TOLERANCE
    request = pb.EmbedRequest(prompt=ids_prompt([5], [0]))
    assert refused_field(lambda: stubs.inference.Embed(request)) == "prompt.token_ids.types"
    # an adapter for text has no head, one with a head continues no text
    refused = pb.GenerateRequest(adapter=f"{tenant}/seq", prompt=ids_prompt(ids))
    assert refused_field(lambda: stubs.inference.Generate(refused), "FAILED_PRECONDITION") == (
        "adapter"
    )
    assert server.idle


def test_a_client_that_goes_away(world: World) -> None:
    channel = grpc.insecure_channel(world.server.target)
    method = channel.unary_unary("/manylora.v1.InferenceService/Embed")
    calls = [
        method.future(pb.EmbedRequest(prompt=ids_prompt([5] * 100)).SerializeToString())
        for _ in range(20)
    ]
    channel.close()
    assert len(calls) == 20
    eventually(lambda: world.server.idle)
