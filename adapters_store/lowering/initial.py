"""Initialisations of LoRA that change the base's weights: W' = W - scale · B₀ A₀.

peft computes the initial pair again whenever it loads the adapter, and so it is done here: the
edit of the shared, unchanged base is scale · (B A - B₀ A₀), of twice the rank. PiSSA, Meng et al.
2024 (arXiv:2404.02948): the r largest singular values. OLoRA, Büyükakyüz 2024
(arXiv:2406.01775): the first r of a QR decomposition. Either product is the same however its
factors are chosen; it is computed in float32, as peft does. PiSSA by random projections, CorDA,
LoftQ and LoRA-GA need what is not in the checkpoint.
"""

from __future__ import annotations

import re
from enum import Enum

import torch

from manylora.adapters_store.edits import ModuleEdit, ModuleKind
from manylora.adapters_store.files import CONFIG_FILE
from manylora.adapters_store.lowering.config_reader import ConfigReader
from manylora.adapters_store.lowering.low_rank import difference
from manylora.adapters_store.lowering.place import Place
from manylora.errors import FailedPrecondition

_PLAIN = (True, False, "gaussian", "eva", "orthogonal", "mica")
_NOT_EXACT = re.compile(r"pissa_niter_\d+|corda|loftq|lora_ga", re.IGNORECASE)


_LEAST_GAP = 1e-5  # of two singular values, as a part of the largest


class Init(Enum):
    PLAIN = "leaves the base alone"
    PISSA = "pissa"
    OLORA = "olora"


def read_init(reader: ConfigReader) -> Init:
    """Raises FailedPrecondition for what cannot be computed again."""
    init = reader.config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    if any(type(name) is type(plain) and name == plain for plain in _PLAIN):
        return Init.PLAIN
    if init in (Init.PISSA.value, Init.OLORA.value):
        return Init(init)
    field = reader.field("init_lora_weights")
    if isinstance(name, str) and _NOT_EXACT.fullmatch(name):
        raise FailedPrecondition(
            "this initialisation changes the base's weights, which all adapters here share",
            field=field,
            found=init,
            wanted="the adapter converted to plain LoRA (peft: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...))",
        )
    raise FailedPrecondition(
        "unknown initialisation", field=field, found=ascii(init), wanted="one of peft 0.21's"
    )


def minus_initial(edit: ModuleEdit, init: Init, place: Place) -> ModuleEdit:
    """The edit of the unchanged base.

    Raises FailedPrecondition without the base's weight, where it leaves the pair undetermined,
    for a tied weight, and for OLoRA of a Conv1D, which peft cannot run.
    """
    assert edit.a is not None
    assert edit.b is not None
    rank = edit.rank
    if place.shape.kind is ModuleKind.QUANTISED:
        raise FailedPrecondition(
            "peft changes the base's weights and quantises them anew",
            field=place.name,
            wanted="the adapter converted to plain LoRA",
        )
    if place.shape.tied:
        raise FailedPrecondition(
            "peft changes the input embedding with the weight that is tied to it",
            field=place.name,
            wanted="the adapter converted to plain LoRA",
        )
    if init is Init.PISSA and edit.scale <= 0:
        raise FailedPrecondition(
            "PiSSA divides by the scale",
            field=f"{CONFIG_FILE}: lora_alpha",
            found=edit.scale,
            wanted="more than 0",
        )
    if init is Init.PISSA:
        a0, b0 = _principal(place, rank, edit.scale)
    elif place.shape.kind is ModuleKind.CONV1D:
        raise FailedPrecondition("peft has no OLoRA for Conv1D", field=place.name, wanted="Linear")
    else:
        q, r = torch.linalg.qr(place.weight())
        a0, b0 = r[:rank], q[:, :rank]
    return difference(edit.a.double(), edit.b.double(), a0.double(), b0.double(), edit.scale)


def _principal(place: Place, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    left, sizes, right = torch.linalg.svd(place.weight(), full_matrices=False)
    if rank < len(sizes) and sizes[rank - 1] - sizes[rank] < _LEAST_GAP * sizes[0]:
        raise FailedPrecondition(
            "PiSSA's initial pair is not determined: two singular values are equal",
            field=f"{place.name}.weight",
            found=f"values {rank} and {rank + 1}, {float(sizes[rank - 1])}",
        )
    root = (sizes[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
