"""Uni-LoRA: every entry of every factor is one entry of a single vector (arXiv:2506.00799).

peft (`tuners/unilora`): y += B (A x), A = θ[i] ∘ s[i], with indices i that are drawn from
`proj_seed` for all adapted modules together, in the order of the base's tree, and s the inverse
square root of how often each entry of θ is used. The file has θ alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from manylora.adapters_store.edits import ModuleEdit
from manylora.adapters_store.files import WEIGHTS_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader, KnownKeys
from manylora.adapters_store.lowering.low_rank import balanced
from manylora.adapters_store.lowering.method import Family, Shape, Shapes
from manylora.adapters_store.lowering.patterns import Matcher
from manylora.adapters_store.lowering.place import Place, Sizes
from manylora.adapters_store.lowering.targets import Targets, read_targets
from manylora.adapters_store.lowering.tensors import Names
from manylora.errors import InvalidArgument

_THETA = "unilora_theta_d"
_MAX_SEED = 1 << 62
_KEYS = KnownKeys(
    understood=(
        "r",
        "proj_seed",
        "theta_d_length",
        "target_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "modules_to_save",
    ),
    harmless=("unilora_dropout", "fan_in_fan_out", "init_weights", "init_theta_d_bound"),
    off={"save_indices": (False, None)},
)


@dataclass(slots=True, frozen=True)
class _UniLora:
    size: int
    length: int
    seed: int
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        return {}

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.size

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        counts = [self.size * (p.shape.in_size + p.shape.out_size) for p in places]
        indices = _draw(sum(counts), self.length, self.seed)
        used = torch.bincount(indices, minlength=self.length).float()
        scales = torch.where(used > 0, used.rsqrt(), 0.0)
        own = torch.split(indices, counts)
        return {
            place.name: self._edit(place, part, scales)
            for place, part in zip(places, own, strict=True)
        }

    def _edit(self, place: Place, indices: torch.Tensor, scales: torch.Tensor) -> ModuleEdit:
        weight = place.own("weight")
        if weight is not None and weight.is_floating_point():
            scales = scales.to(weight.dtype)  # as peft keeps them
        entries = place.shared[_THETA].double()[indices] * scales.double()[indices]
        a, b = torch.tensor_split(entries, [self.size * place.shape.in_size])
        return balanced(a.view(self.size, -1), b.view(-1, self.size))


def _draw(count: int, length: int, seed: int) -> torch.Tensor:
    """int64 [count]: each of 0 to length - 1 as often as any other, or once more."""
    generator = np.random.default_rng(seed)
    data = np.repeat(np.arange(length), count // length)
    if more := count % length:
        data = np.concatenate([data, generator.choice(length, size=more, replace=False)])
    generator.shuffle(data)
    return torch.from_numpy(data)


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _UniLora:
    length = reader.whole_number("theta_d_length", least=1, most=1 << 30)
    if shared.get(_THETA) != (length,):
        raise InvalidArgument(
            "the vector is not what the config says",
            field=f"{WEIGHTS_FILE}: {_THETA}",
            found=list(shared.get(_THETA, ())) or "nothing",
            wanted=f"[{length}]",
        )
    return _UniLora(
        size=reader.whole_number("r", least=1, most=max_rank),
        length=length,
        seed=reader.whole_number("proj_seed", least=0, most=_MAX_SEED),
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(_KEYS, Names((), (_THETA,)), _read, learned_biases="unilora_only")
