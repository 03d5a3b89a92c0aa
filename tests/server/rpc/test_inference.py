"""InferenceService over a real connection to a real engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manylora_testing.models import tiny_model
from manylora_testing.oracle import peft_greedy
from manylora_testing.served import Served, served
from manylora_testing.served_fixtures import CONTEXT
from manylora_testing.stubs import Stubs, refusal, refused_field, text_request
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora.server.engine.settings import EngineSettings
from manylora.v1 import inference_pb2 as pb

STEPS = 12


def ids_request(ids: list[int], adapter: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        adapter=adapter,
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=ids)),
        sampling=pb.Sampling(**sampling),
    )


def chat(*messages: tuple[str, str]) -> pb.Prompt:
    rows = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return pb.Prompt(chat=pb.Chat(messages=rows))


def test_generate_is_what_peft_generates(
    stubs: Stubs, tenant: str, base_model: Path, adapter_dirs: list[Path]
) -> None:
    prompt = [1, 40, 77, 200, 13]
    for i, directory in enumerate(adapter_dirs):
        stubs.publish(f"tenants/{tenant}", f"a{i}", directory, "prod")
    references = ["", f"{tenant}/a0", f"{tenant}/a1@1", f"{tenant}/a2:prod"]
    for reference, directory in zip(references, [None, *adapter_dirs], strict=True):
        answer = stubs.inference.Generate(
            ids_request(prompt, reference, max_tokens=STEPS, ignore_eos=True)
        )
        assert list(answer.token_ids) == peft_greedy(base_model, directory, prompt, STEPS)
        assert answer.finish_reason == pb.FINISH_REASON_LENGTH
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == STEPS
        name = reference.split("@")[0].split(":")[0]
        assert answer.adapter == (f"{name}@1" if name else "")
        assert not answer.logprobs


def test_a_stream_adds_up_to_generate(stubs: Stubs) -> None:
    request = text_request("the printer", max_tokens=40, ignore_eos=True, logprobs=2)
    whole = stubs.inference.Generate(request)
    parts = list(stubs.inference.StreamGenerate(request))
    assert len(parts) > 1
    assert "".join(part.text for part in parts) == whole.text
    assert [i for part in parts for i in part.token_ids] == list(whole.token_ids)
    assert [entry.chosen.token_id for part in parts for entry in part.logprobs] == list(
        whole.token_ids
    )
    assert all(part.finish_reason == pb.FINISH_REASON_UNSPECIFIED for part in parts[:-1])
    assert not any(part.HasField("usage") for part in parts[:-1])
    assert parts[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert parts[-1].usage.completion_tokens == 40


def test_logprobs_are_of_the_chosen_token_and_the_likeliest(stubs: Stubs) -> None:
    answer = stubs.inference.Generate(text_request("hello", max_tokens=3, logprobs=3))
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry.chosen.token_id == token == entry.top[0].token_id
        values = [choice.logprob for choice in entry.top]
        assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] <= 0
    bare = stubs.inference.Generate(text_request("hello", max_tokens=1, logprobs=0))
    assert bare.logprobs[0].chosen.token_id == bare.token_ids[0] and not bare.logprobs[0].top


def test_sampling_fields_reach_the_engine(stubs: Stubs) -> None:
    def ids(**sampling: Any) -> list[int]:
        request = text_request("hello", max_tokens=16, ignore_eos=True, **sampling)
        return list(stubs.inference.Generate(request).token_ids)

    greedy = ids()
    assert ids(temperature=0.0) == greedy
    assert ids(temperature=50.0, seed=7) == ids(temperature=50.0, seed=7) != greedy
    assert ids(temperature=50.0, seed=8) != ids(temperature=50.0, seed=7)
    for narrowed in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert ids(temperature=50.0, seed=7, **narrowed) == greedy
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert ids(**{penalty: 2.0}) != greedy
    assert len(set(ids(repetition_penalty=100.0))) > len(set(greedy))


def test_stops(stubs: Stubs) -> None:
    whole = stubs.inference.Generate(text_request("hello", max_tokens=20, ignore_eos=True))
    stop_id = whole.token_ids[5]
    first = list(whole.token_ids).index(stop_id)
    answer = stubs.inference.Generate(
        text_request("hello", max_tokens=20, ignore_eos=True, stop_token_ids=[stop_id])
    )
    assert list(answer.token_ids) == list(whole.token_ids)[: first + 1]
    assert answer.finish_reason == pb.FINISH_REASON_STOP
    stop = whole.text[4:6]
    answer = stubs.inference.Generate(
        text_request("hello", max_tokens=20, ignore_eos=True, stop=[stop])
    )
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == pb.FINISH_REASON_STOP


def test_the_context_ends_an_answer(stubs: Stubs) -> None:
    prompt = [5] * (CONTEXT - 3)
    answer = stubs.inference.Generate(ids_request(prompt, max_tokens=2**31 - 1, ignore_eos=True))
    assert len(answer.token_ids) == 3
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH


def test_chat_and_tokenize(stubs: Stubs) -> None:
    text = "naïve 東京 \x00🦊"
    tokens = stubs.inference.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=text))).token_ids
    assert tokens[0] == 1
    conversation = chat(("system", "Be brief."), ("user", "hi"), ("assistant", ""))
    laid_out = "<s>system: Be brief.\n<s>user: hi\n<s>assistant: \n<s>assistant: "
    chat_tokens = stubs.inference.Tokenize(pb.TokenizeRequest(prompt=conversation)).token_ids
    same = stubs.inference.Tokenize(
        pb.TokenizeRequest(prompt=pb.Prompt(text=laid_out.removeprefix("<s>")))
    ).token_ids
    assert list(chat_tokens) == list(same)
    sampling = pb.Sampling(max_tokens=4, ignore_eos=True)
    by_chat = stubs.inference.Generate(pb.GenerateRequest(prompt=conversation, sampling=sampling))
    by_ids = stubs.inference.Generate(ids_request(list(chat_tokens), max_tokens=4, ignore_eos=True))
    assert by_chat.token_ids == by_ids.token_ids and by_chat.text == by_ids.text


def test_model_info(stubs: Stubs) -> None:
    info = stubs.inference.GetModelInfo(pb.GetModelInfoRequest())
    assert info.name == "tiny-llama"
    assert info.architecture == "LlamaForCausalLM"
    assert (info.dtype, info.device) == ("float32", "cpu")
    assert (info.max_context, info.vocab_size) == (CONTEXT, TOKENIZER_VOCAB)
    assert info.kernels and info.modules > 14


PROMPTS = [
    (pb.Prompt(), "prompt"),
    (pb.Prompt(text=""), "prompt.text"),
    (pb.Prompt(token_ids=pb.TokenIds()), "prompt.token_ids"),
    (pb.Prompt(chat=pb.Chat()), "prompt.chat"),
    (chat(("user", "hi"), ("", "x")), "prompt.chat.messages[1].role"),
    (chat(("wizard", "hi")), "prompt.chat.messages"),
    (pb.Prompt(token_ids=pb.TokenIds(ids=[1, -1])), "prompt.token_ids"),
    (pb.Prompt(token_ids=pb.TokenIds(ids=[TOKENIZER_VOCAB])), "prompt.token_ids"),
    (pb.Prompt(token_ids=pb.TokenIds(ids=[2**31 - 1])), "prompt.token_ids"),
    (pb.Prompt(token_ids=pb.TokenIds(ids=[5] * CONTEXT)), "prompt"),
    (pb.Prompt(text="the printer is on fire " * 20_000), "prompt"),
    (
        pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a" * 300_000)] * 2)),
        "prompt",
    ),
]


@pytest.mark.parametrize(("prompt", "field"), PROMPTS, ids=[field for _, field in PROMPTS])
def test_bad_prompts(stubs: Stubs, prompt: pb.Prompt, field: str) -> None:
    request = pb.GenerateRequest(prompt=prompt)
    assert refused_field(lambda: stubs.inference.Generate(request)) == field
    assert refused_field(lambda: list(stubs.inference.StreamGenerate(request))) == field


def test_tokens_are_not_tokenized(stubs: Stubs) -> None:
    prompt = pb.Prompt(token_ids=pb.TokenIds(ids=[1]))
    request = pb.TokenizeRequest(prompt=prompt)
    assert refused_field(lambda: stubs.inference.Tokenize(request)) == "prompt.token_ids"
    assert refused_field(lambda: stubs.inference.Tokenize(pb.TokenizeRequest())) == "prompt"


SAMPLING: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", math.nan),
    ("top_k", -1),
    ("min_p", -0.1),
    ("min_p", 2.0),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -1e300),
    ("stop", ["x"] * 17),
    ("stop", [""]),
    ("stop", ["x" * 10_000]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [TOKENIZER_VOCAB]),
    ("logprobs", -1),
    ("logprobs", 1000),
]


@pytest.mark.parametrize(("name", "value"), SAMPLING)
def test_absurd_sampling(stubs: Stubs, name: str, value: Any) -> None:
    request = text_request("hello", **{name: value})
    field = refused_field(lambda: stubs.inference.Generate(request))
    assert field.partition("[")[0] == f"sampling.{name}"


@pytest.mark.parametrize(
    "reference",
    [
        "acme",
        "/",
        "acme/",
        "../etc",
        "acme/..",
        "acme/../x",
        "acme/a/b",
        "acme/a@0",
        "acme/a@-1",
        "acme/a@x",
        "acme/a@٣",
        "acme/a:",
        "acme/a:b:c",
        "acme/ａdapter",
        "аcme/cyrillic",
        "acme/x\u202etxt",
        "acme/x\x00",
        "Acme/A",
        "a" * 10_240,
        "a/" + "b" * 10_240,
        "a/" + "🦊" * 2_560,
    ],
    ids=ascii,
)
def test_bad_adapter_references(stubs: Stubs, reference: str) -> None:
    request = text_request("hello", reference)
    assert refused_field(lambda: stubs.inference.Generate(request)).startswith("adapter")


@pytest.mark.parametrize("suffix", ["", "@7", ":prod", ":latest"])
def test_unknown_adapters(stubs: Stubs, tenant: str, suffix: str) -> None:
    reference = f"{tenant}/none{suffix}"
    code, details = refusal(lambda: stubs.inference.Generate(text_request("hello", reference)))
    assert code == "NOT_FOUND"
    assert details["ResourceInfo"].resource_name == reference
    assert details["ErrorInfo"].metadata["field"] == "adapter"


def test_a_base_without_chat_template(tmp_path: Path, connect: Callable[[Served], Stubs]) -> None:
    directory = tiny_model("llama", tmp_path / "base", vocab_size=TOKENIZER_VOCAB)
    tiny_tokenizer(directory, chat_template=None)
    settings = EngineSettings(model=directory, kv_cache_bytes=1 << 20, adapter_bytes=1 << 20)
    with served(settings, tmp_path / "store") as running:
        stubs = connect(running)
        request = pb.GenerateRequest(prompt=chat(("user", "hi")))
        code, details = refusal(lambda: stubs.inference.Generate(request))
    assert code == "FAILED_PRECONDITION"
    assert "chat template" in details["PreconditionFailure"].violations[0].description
