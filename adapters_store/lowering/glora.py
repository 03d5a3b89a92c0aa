"""GLoRA: y = (W + W ∘ A + B) x + b + b ∘ D + E + W C (Chavan et al. 2023, arXiv:2306.07967;
peft's `tuners/glora`).

With A and B a number for each output, or one for all, this is out_scale, a part of rank 1 and a
bias. Low-rank A and B make W ∘ A, which has no small form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition

_LETTERS = "ABCDE"
_MAX_RANK = 1 << 20
_KEYS = KnownKeys(
    understood=("r", "target_modules", "config_A_B", "config_C", "config_D_E", "modules_to_save"),
    harmless=("init_weights",),
    off={"bias": ("none",)},  # a trained bias would be b above
)


@dataclass(slots=True, frozen=True)
class _Glora:
    """forms: of each of A to E, "lora", "vector", "constant" or "none"."""

    rank_of_c: int
    forms: Mapping[str, str]
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        biased = all(
            f"glora_{letter}.zeros" not in found for letter in "CDE" if self.forms[letter] != "none"
        )
        shapes: dict[str, Shape] = {}
        for letter in _LETTERS:
            form = self.forms[letter] if biased or letter in "AB" else "none"
            shapes |= {f"glora_{letter}.{n}": s for n, s in self._leaves(letter, form, sizes)}
        return shapes

    def _leaves(self, letter: str, form: str, sizes: Sizes) -> Sequence[tuple[str, Shape]]:
        out = (sizes.outputs,)
        whole: Mapping[str, Shape] = {
            "A": (*out, sizes.inputs),
            "B": (*out, sizes.inputs),
            "C": (sizes.inputs, 1),
            "D": out,
            "E": out,
        }
        if form == "none":
            return [("zeros", whole[letter])]
        if form == "constant":
            return [("X", (1,))]
        if form == "lora":
            return [("Xd", (sizes.inputs, self.rank_of_c)), ("Xu", (self.rank_of_c, 1))]
        return [("X", (*out, 1) if letter in "AB" else whole[letter])]

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return 0 if self.forms["B"] == "none" else 1

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: _edit(place) for place in places}


def _edit(place: Place) -> ModuleEdit:
    bias, out = place.bias(), place.shape.out_size
    a, b = _value(place, "A"), _value(place, "B")
    edit = ModuleEdit()
    if "glora_B.zeros" not in place.tensors:
        ones = torch.ones(1, place.shape.in_size, dtype=torch.float64)
        edit = balanced(ones, b.expand(out, 1))
    scaled = "glora_A.zeros" not in place.tensors
    out_scale = (1 + a).reshape(-1).expand(out) if scaled else torch.ones(out, dtype=torch.float64)
    if scaled:
        edit.out_scale = out_scale.float()
    if bias is not None:
        own = bias * (1 + _value(place, "D")) + _value(place, "E") + _product_with_c(place)
        edit.bias = (own - out_scale * bias).float()
    return edit


def _value(place: Place, letter: str) -> torch.Tensor:
    """A vector or a number, float64. Raises FailedPrecondition where zeros are none."""
    name = f"glora_{letter}.zeros"
    if name not in place.tensors:
        return place.double(f"glora_{letter}.X")
    if place.tensors[name].any():
        raise FailedPrecondition(
            "this tensor holds zeros by its name",
            field=f"{WEIGHTS_FILE}: {place.name}.{name}",
            found="other values",
        )
    return torch.zeros(1, dtype=torch.float64)


def _product_with_c(place: Place) -> torch.Tensor:
    """W C, float64 [out]."""
    if "glora_C.Xd" in place.tensors:
        c = place.double("glora_C.Xd") @ place.double("glora_C.Xu")
    elif "glora_C.X" in place.tensors:
        c = place.double("glora_C.X")
    else:
        return _value(place, "C")
    return torch.cat([weight @ c[:, 0] for _, weight in place.row_blocks()])


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _Glora:  # noqa: ARG001
    a_b = _form(reader, "config_A_B", "vector", "constant", "none")
    d_e = _form(reader, "config_D_E", "vector", "constant", "none")
    c = _form(reader, "config_C", "lora", "vector", "none")
    return _Glora(
        reader.whole_number("r", least=1, most=_MAX_RANK),
        {"A": a_b, "B": a_b, "C": c, "D": d_e, "E": d_e},
        read_targets(reader, Matcher()),
    )


def _form(reader: ConfigReader, key: str, *served: str) -> str:
    value = reader.config.get(key)
    if value not in served:
        raise FailedPrecondition(
            "this form is not served",
            field=reader.field(key),
            found=ascii(value),
            wanted=" or ".join(served),
        )
    return str(value)


_LEAVES = ("X", "Xd", "Xu", "zeros")
_NAMES = Names([f"glora_{letter}.{leaf}" for letter in _LETTERS for leaf in _LEAVES])
FAMILY = Family(_KEYS, _NAMES, _read, kinds=(ModuleKind.LINEAR,))
