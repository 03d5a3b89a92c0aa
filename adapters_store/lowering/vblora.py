"""VB-LoRA: both factors are put together from short vectors of one bank.

Li et al. 2024 (arXiv:2405.15179). peft (`tuners/vblora`): each piece of A and B, `vector_length`
long, is the sum of the bank's `topk` vectors with the largest logits, weighted by their softmax;
y += B (A x).
"""

from __future__ import annotations

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

_A, _B, _BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"
_KEYS = KnownKeys(
    understood=(
        "r",
        "num_vectors",
        "vector_length",
        "topk",
        "bias",
        *TARGET_KEYS,
        "modules_to_save",
    ),
    harmless=("vblora_dropout", "fan_in_fan_out", "init_vector_bank_bound", "init_logits_std"),
    off={"save_only_topk_weights": (False, None)},
)


@dataclass(slots=True, frozen=True)
class _VbLora:
    size: int
    vectors: int
    length: int
    top: int
    targets: Targets

    def shapes(self, module: str, sizes: Sizes, found: Shapes) -> Mapping[str, Shape]:  # noqa: ARG002
        return {
            _A: (self.size, self._pieces(module, sizes.inputs), self.vectors),
            _B: (self._pieces(module, sizes.outputs), self.size, self.vectors),
        }

    def rank(self, module: str, shapes: Shapes) -> int:  # noqa: ARG002
        return self.size

    def edits(self, places: Sequence[Place]) -> Mapping[str, ModuleEdit]:
        return {place.name: self._edit(place) for place in places}

    def _edit(self, place: Place) -> ModuleEdit:
        bank = place.shared[_BANK].double()
        a, b = (self._mixed(place.tensors[part], bank) for part in (_A, _B))
        return balanced(a.flatten(1), b.transpose(1, 2).flatten(0, 1))

    def _mixed(self, logits: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """[…, vectors] → […, length]."""
        largest, indices = logits.topk(self.top, dim=-1)
        return (largest.double().softmax(-1)[..., None] * bank[indices]).sum(-2)

    def _pieces(self, module: str, size: int | None) -> int | None:
        if size is None:
            return None
        if size % self.length:
            raise FailedPrecondition(
                f"vector_length does not divide a size of {module}",
                field=f"{WEIGHTS_FILE}: {_BANK}",
                found=self.length,
                wanted=f"a divisor of {size}",
            )
        return size // self.length


def _read(reader: ConfigReader, shared: Shapes, max_rank: int) -> _VbLora:
    vectors = reader.whole_number("num_vectors", least=1, most=1 << 30)
    length = reader.whole_number("vector_length", least=1, most=1 << 30)
    if shared.get(_BANK) != (vectors, length):
        raise InvalidArgument(
            "the vector bank is not what the config says",
            field=f"{WEIGHTS_FILE}: {_BANK}",
            found=list(shared.get(_BANK, ())) or "nothing",
            wanted=str([vectors, length]),
        )
    return _VbLora(
        size=reader.whole_number("r", least=1, most=max_rank),
        vectors=vectors,
        length=length,
        top=reader.whole_number("topk", least=1, most=vectors),
        targets=read_targets(reader, Matcher()),
    )


FAMILY = Family(_KEYS, Names((_A, _B), (_BANK,)), _read, "vblora_only", ANY_LINEAR)
