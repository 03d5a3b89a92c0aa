"""VeRA and PVeRA: one random pair of projections for all modules, and two vectors for each.

Kopiczko et al. 2024 (arXiv:2310.11454); PVeRA (arXiv:2512.07703), whose projection has a mean and
a variance, of which only the mean counts when nothing is sampled. peft
(`tuners/vera`, `tuners/pvera`): y += λ_b ∘ (B[:out] (λ_d ∘ (A[:, :in] x))). The projections are in
the file, or made again by peft's own random generator from `projection_prng_key`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import ANY_LINEAR, Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import TARGET_KEYS, Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import FailedPrecondition, InvalidArgument


@dataclass(slots=True, frozen=True)
class _Vera:
    """word: what the tensors' names begin with. sampled: a variance goes with each mean."""

    word: str
    size: int
    seed: int
    saved: bool
    sampled: bool
    projections: Shapes
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        widths = (sizes.inputs, sizes.outputs)
        for name, wanted, axis in zip(self.projections, widths, (1, 0), strict=False):
            shape = self.projections[name]
            if shape[1 - axis] != self._rows(name) or shape[axis] < (wanted or 1):
                raise FailedPrecondition(
                    "the tensor's shape does not fit",
                    field=f"{WEIGHTS_FILE}: {name}",
                    found=list(shape),
                    wanted=f"{self._rows(name)} by at least {wanted or 1}",
                )
        return {
            f"{self.word}_lambda_b": (sizes.outputs,),
            f"{self.word}_lambda_d": (self._rows(f"{self.word}_A"),),
        }

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.size

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        a, b = self._projections(places)
        return {place.name: self._edit(place, a, b) for place in places}

    def _edit(self, place: Place, a: torch.Tensor, b: torch.Tensor) -> ModuleEdit:
        lambda_b = place.double(f"{self.word}_lambda_b")[:, None]
        lambda_d = place.double(f"{self.word}_lambda_d")[:, None]
        full_a = lambda_d * a[:, : place.shape.in_size].double()
        full_b = lambda_b * b[: place.shape.out_size].double()
        return balanced(full_a[: self.size], full_b)

    def _projections(self, places: Sequence[Place]) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rows, widest in] and B [widest out, rank]."""
        names = (f"{self.word}_A", f"{self.word}_B")
        if self.saved:
            return places[0].shared[names[0]], places[0].shared[names[1]]
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        widest_in = max(place.shape.in_size for place in places)
        widest_out = max(place.shape.out_size for place in places)
        a = _kaiming_uniform((self._rows(names[0]), widest_in), generator)
        return a, _kaiming_uniform((widest_out, self.size), generator)

    def _rows(self, projection: str) -> int:
        doubled = self.sampled and projection.endswith("_A")
        return 2 * self.size if doubled else self.size


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """As peft draws it: uniform within ±√6 / √columns, float32."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _read(word: str, reader: ConfigReader, shared: Shapes, max_rank: int) -> _Vera:
    saved = reader.config.get("save_projection") is not False
    wanted = (f"{word}_A", f"{word}_B") if saved else ()
    if set(shared) != set(wanted):
        raise InvalidArgument(
            "the file's projections are not what the config says",
            field=reader.field("save_projection"),
            found=" and ".join(shared) or "none",
            wanted=" and ".join(wanted) or "none",
        )
    for name, shape in shared.items():
        if len(shape) != 2:
            raise InvalidArgument(
                "not a matrix", field=f"{WEIGHTS_FILE}: {name}", found=list(shape)
            )
    return _Vera(
        word=word,
        size=reader.whole_number("r", least=1, most=max_rank),
        seed=reader.whole_number("projection_prng_key", least=0, most=(1 << 63) - 1),
        saved=saved,
        sampled=word == "pvera",
        projections={name: shared[name] for name in wanted},
        targets=read_targets(reader, Matcher()),
    )


def _family(word: str) -> Family:
    keys = KnownKeys(
        understood=(
            "r",
            "projection_prng_key",
            "save_projection",
            "bias",
            *_VERA_TARGETS,
            "modules_to_save",
        ),
        harmless=(
            "fan_in_fan_out",
            "d_initial",
            "init_weights",
            *((f"{word}_dropout",) if word == "vera" else (f"{word}_dropout", "generator_seed")),
        ),
        off={
            **({} if word == "vera" else {"sample_at_inference": (False, None)}),
        },
    )
    parts, shared = (f"{word}_lambda_b", f"{word}_lambda_d"), (f"{word}_A", f"{word}_B")
    return Family(
        keys,
        Names(parts, shared),
        lambda reader, shapes, most: _read(word, reader, shapes, most),
        learned_biases=f"{word}_only",
        kinds=ANY_LINEAR,
    )


_VERA_TARGETS = tuple(key for key in TARGET_KEYS if key != "exclude_modules")
FAMILY = _family("vera")
PVERA = _family("pvera")
