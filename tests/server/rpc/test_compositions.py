"""Several adapters with weights in one request, over a real connection."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from manylora_testing.served import Served
from manylora_testing.stubs import Stubs, refusal, refused_field, text_request
from transformers import AutoModelForCausalLM

from manylora.v1 import adapters_pb2
from manylora.v1 import inference_pb2 as pb

PROMPT = [1, 40, 77, 200, 13]


def ask(stubs: Stubs, adapter: str) -> pb.GenerateResponse:
    return stubs.inference.Generate(
        pb.GenerateRequest(
            adapter=adapter,
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT)),
            sampling=pb.Sampling(max_tokens=8, ignore_eos=True),
        )
    )


@pytest.fixture
def published(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> str:
    for i, directory in enumerate(adapter_dirs[:2]):
        stubs.publish(f"tenants/{tenant}", f"a{i}", directory, "prod")
    return tenant


@torch.no_grad()
def test_answers_as_peft(
    stubs: Stubs, published: str, base_model: Path, adapter_dirs: list[Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    combined = peft.PeftModel.from_pretrained(model, adapter_dirs[0], adapter_name="0")
    combined.load_adapter(adapter_dirs[1], "1")
    combined.add_weighted_adapter(["0", "1"], [0.75, -0.5], "sum", combination_type="cat")
    combined.set_adapter("sum")
    answer = ask(stubs, f"{published}/a0:prod*0.75+{published}/a1*-0.5")
    tokens = list(answer.token_ids)
    rows = combined.eval()(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1]
    assert tokens == rows.argmax(dim=-1).tolist()
    assert answer.adapter == f"{published}/a0@1*0.75+{published}/a1@1*-0.5"
    assert ask(stubs, answer.adapter).token_ids == answer.token_ids


def test_the_same_adapter_by_two_names_is_one(stubs: Stubs, published: str) -> None:
    twice = ask(stubs, f"{published}/a0*0.25+{published}/a0:prod*0.75")
    assert twice.adapter == f"{published}/a0@1"
    assert twice.token_ids == ask(stubs, f"{published}/a0").token_ids
    none = text_request("hello", f"{published}/a0*0.5+{published}/a0@1*-0.5")
    assert refused_field(lambda: stubs.inference.Generate(none)) == "adapter (weight)"


def test_versions_of_the_same_bytes_add_up(
    stubs: Stubs, published: str, adapter_dirs: list[Path]
) -> None:
    stubs.publish(f"tenants/{published}", "same", adapter_dirs[0])
    both = ask(stubs, f"{published}/same*0.75+{published}/a0*0.25")
    assert both.adapter == f"{published}/a0@1*0.25+{published}/same@1*0.75"
    assert both.token_ids == ask(stubs, f"{published}/a0").token_ids


def test_every_part_must_be_there(stubs: Stubs, published: str) -> None:
    for other in ("b", "a1:canary", "a1@2"):
        request = text_request("hello", f"{published}/a0*0.5+{published}/{other}*0.5")
        code, details = refusal(lambda r=request: stubs.inference.Generate(r))  # type: ignore[misc]
        assert code == "NOT_FOUND"
        assert details["ResourceInfo"].resource_name == f"{published}/{other}"
    for broken in ("+", "*1", f"{published}/a0+", f"{published}/a0*", f"{published}/a0*0.5*0.5"):
        request = text_request("hello", broken)
        field = refused_field(lambda r=request: stubs.inference.Generate(r))  # type: ignore[misc]
        assert field.startswith("adapter")


def test_versions_come_and_go(
    stubs: Stubs, server: Served, published: str, adapter_dirs: list[Path]
) -> None:
    """A new version of a part is taken at once; a deleted one leaves the device with all that it
    is part of, and is not found any more."""
    both = f"{published}/a0*0.5+{published}/a1*0.5"
    before = ask(stubs, both)
    stubs.publish(f"tenants/{published}", "a1", adapter_dirs[2])
    after = ask(stubs, both)
    assert after.adapter == f"{published}/a0@1*0.5+{published}/a1@2*0.5"
    assert after.token_ids != before.token_ids
    assert ask(stubs, before.adapter).token_ids == before.token_ids
    resident = {r.key.label for r in server.run(server.engine.residency())}
    assert {before.adapter, after.adapter} <= resident
    name = f"tenants/{published}/adapters/a1/versions/1"
    stubs.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name))
    resident = {r.key.label for r in server.run(server.engine.residency())}
    assert before.adapter not in resident and after.adapter in resident
    stubs.adapters.DeleteAdapter(
        adapters_pb2.DeleteAdapterRequest(name=f"tenants/{published}/adapters/a1")
    )
    code, _ = refusal(lambda: ask(stubs, both))
    assert code == "NOT_FOUND"


def test_watchers_hear_of_adapters_alone(stubs: Stubs, published: str) -> None:
    ask(stubs, f"{published}/a0*0.5+{published}/a1*0.125")
    ask(stubs, f"{published}/a1")
    events = stubs.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(parent=""))
    try:
        for event in events:
            assert event.name.startswith("tenants/") and "*" not in event.name
            if event.name == f"tenants/{published}/adapters/a1/versions/1":
                break
    finally:
        events.cancel()
