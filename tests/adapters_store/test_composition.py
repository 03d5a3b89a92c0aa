"""Several adapters in one request: how that is written, and what can be added up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from manylora_testing.methods import make_method
from manylora_testing.models import tiny_model

from manylora.adapters_store.composition import (
    MAX_PARTS,
    WeightedRef,
    format_composition,
    parse_composition,
)
from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit
from manylora.adapters_store.format import read_checkpoint
from manylora.adapters_store.head import Head, HeadLayer, Task
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.lowering import lower
from manylora.adapters_store.lowering.compose import Part, compose
from manylora.errors import FailedPrecondition, InvalidArgument
from manylora.server.engine.model.adapt import shape_of

Lowered = Callable[[str], LoweredAdapter]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("acme/a", [("acme/a", 1.0)]),
        ("acme/a@2*0.5", [("acme/a@2", 0.5)]),
        ("acme/a*0.7+b/c:prod*-3", [("acme/a", 0.7), ("b/c:prod", -3.0)]),
        ("acme/a+acme/b*1e-05", [("acme/a", 1.0), ("acme/b", 1e-5)]),
    ],
)
def test_read(text: str, wanted: list[tuple[str, float]]) -> None:
    assert [(term.ref, term.weight) for term in parse_composition(text)] == wanted


NOT_WEIGHTS = ("", "0", "0.0", "-0", "1e-999", "100.5", "-101", "nan", "inf", "1e5", "1e+2", "0x1")
NOT_NUMBERS = ("1_0", ".5", "٣", "1*2", " 1", "1 ", "9" * 400)


@pytest.mark.parametrize("number", [*NOT_WEIGHTS, *NOT_NUMBERS])
def test_not_a_weight(number: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_composition(f"acme/a*0.5+acme/b*{number}")
    assert caught.value.field == "adapter (weight)"


def test_too_many() -> None:
    assert len(parse_composition("+".join(["acme/a"] * MAX_PARTS))) == MAX_PARTS
    with pytest.raises(InvalidArgument, match="too many"):
        parse_composition("+".join(["acme/a"] * (MAX_PARTS + 1)))


@given(st.lists(st.floats(-100, 100).filter(bool), min_size=1, max_size=MAX_PARTS))
def test_written_and_read_back(weights: list[float]) -> None:
    terms = tuple(WeightedRef(f"acme/a{i}@3", weight) for i, weight in enumerate(weights))
    assert parse_composition(format_composition(terms)) == terms


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    root = tmp_path_factory.mktemp("composed")
    directory = tiny_model("llama", root / "base")
    base: Any = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    embedding = base.get_input_embeddings()
    modules = {
        name: shape_of(module)
        for name, module in base.named_modules()
        if type(module) is torch.nn.Linear or module is embedding or name.endswith("norm")
    }
    parameters = dict(base.named_parameters())

    def get(method: str) -> LoweredAdapter:
        path: Path = root / method
        if not path.exists():
            make_method(method, "llama", base, path)
        return lower(read_checkpoint(path), modules, parameters.get)

    return get


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("dora", "scaled outputs in model.layers.0"),
        ("ia3-odd", "scaled inputs in model.layers.0"),
        ("ln-tuning", "a weight of its own in model.layers.0.input_layernorm"),
        ("lora-head-saved", "a weight of its own in lm_head"),
        ("lora-tokens", "token embeddings of its own in model.embed_tokens"),
        ("dora-embedding", "scaled outputs in model.embed_tokens"),
        ("prompt", "tokens before the prompt"),
        ("prefix", "tokens before the prompt"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_sum_is_refused(lowered: Lowered, method: str, found: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        compose([Part("acme/a@1", 0.5, lowered("lora")), Part("acme/b@2", 0.5, lowered(method))])
    assert caught.value.field == "adapter: acme/b@2"
    assert caught.value.found is not None and caught.value.found.startswith(found)
    assert "low-rank" in caught.value.wanted


def edit(rank: int, scale: float, seed: int, dtype: torch.dtype) -> LoweredAdapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, 8), (6, rank)))
    bias = torch.randn(6, generator=generator)
    return LoweredAdapter({"m": ModuleEdit(a=a.to(dtype), b=b.to(dtype), scale=scale, bias=bias)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_exact(dtype: torch.dtype) -> None:
    """Also where scales differ by orders of magnitude, and signs."""
    parts = [
        Part("a", 0.7, edit(3, 16.0, 0, dtype)),
        Part("b", -2.5, edit(2, 1e-3, 1, dtype)),
        Part("c", 1e-2, edit(4, 3.0, 2, dtype)),
    ]
    total = compose(parts).edits["m"]
    assert total.rank == 9 and total.a is not None and total.b is not None
    found = total.scale * total.b.double() @ total.a.double()
    wanted, bias = torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for part in parts:
        own = part.lowered.edits["m"]
        assert own.a is not None and own.b is not None and own.bias is not None
        wanted += part.weight * own.scale * own.b.double() @ own.a.double()
        bias += part.weight * own.bias.double()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total.bias, bias.float())
    # the largest one's numbers stay as they are in the file
    largest = parts[0].lowered.edits["m"].b
    assert largest is not None and torch.equal(total.b[:, :3].to(dtype), largest)


def test_ranks_add_up_to_a_limit() -> None:
    parts = [Part(name, 1.0, edit(3, 1.0, 0, torch.float32)) for name in "ab"]
    assert compose(parts, Limits(max_rank=6)).edits["m"].rank == 6
    with pytest.raises(FailedPrecondition, match="found rank 6 of m; wanted at most 5"):
        compose(parts, Limits(max_rank=5))


def test_tasks_are_the_same_and_bring_no_layers() -> None:
    plain = edit(1, 1.0, 0, torch.float32)
    embeds = replace(plain, head=Head(Task.FEATURE_EXTRACTION))
    layer = HeadLayer(torch.ones(2, 8), None)
    classifies = replace(plain, head=Head(Task.SEQ_CLS, {"score": layer}))
    both = compose([Part("a", 0.5, embeds), Part("b", 0.5, embeds)])
    assert both.head is not None and both.head.task is Task.FEATURE_EXTRACTION
    with pytest.raises(FailedPrecondition, match="found a head, score"):
        compose([Part("a", 0.5, classifies), Part("b", 0.5, classifies)])
    for first, second in ((plain, embeds), (embeds, plain)):
        with pytest.raises(FailedPrecondition, match="different tasks") as caught:
            compose([Part("a", 0.5, first), Part("b", 0.5, second)])
        assert caught.value.field == "adapter: b"


def test_nothing_is_lost_of_a_zero_scale() -> None:
    """alpha 0: an adapter without effect is still no error."""
    total = compose([Part("a", 0.5, edit(2, 0.0, 0, torch.float32))]).edits["m"]
    assert total.b is not None and not total.b.any() and math.isfinite(total.scale)
