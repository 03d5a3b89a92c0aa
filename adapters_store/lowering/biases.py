"""Biases that were trained with the adapter (`bias`: "all", "lora_only" and their like).

peft puts them in the place of the base's when it loads the adapter: a linear module's output
changes by the difference, a norm gets a bias of its own. Paper: Ben Zaken et al. 2021, BitFit
(arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch

from manylora.adapters_store.edits import ModuleEdit, ModuleKind, ModuleShape
from manylora.adapters_store.files import CONFIG_FILE, WEIGHTS_FILE
from manylora.adapters_store.format import Checkpoint
from manylora.adapters_store.lowering.base_copies import BaseParameter, check_base_copies
from manylora.adapters_store.lowering.config_reader import ConfigReader
from manylora.adapters_store.lowering.tensors import FileParts
from manylora.errors import FailedPrecondition

_BIAS = ".bias"


def read_trained(reader: ConfigReader, only: str) -> bool:
    """Whether biases were trained. only: the method's word for 'the adapted modules' biases'; a
    method that has no such option is given "".

    Raises FailedPrecondition for a value that peft does not know.
    """
    if not only:
        return False
    value = reader.config.get("bias", "none")
    if value not in ("none", "all", only):
        raise FailedPrecondition(
            "this option is not served",
            field=f"{CONFIG_FILE}: bias",
            found=value,
            wanted=f"'none', 'all' or {only!r}",
        )
    return value != "none"


def check_biases(
    checkpoint: Checkpoint,
    parts: FileParts,
    trained: bool,
    modules: Mapping[str, ModuleShape],
    parameter: BaseParameter | None,
) -> None:
    """Copies of the base's parameters are trained biases that fit adaptable modules, under the
    names by which peft finds them, or else the base's own values.

    Raises FailedPrecondition naming the tensor.
    """
    copies = {}
    for name, copy in parts.copies.items():
        if not trained or name.removesuffix(_BIAS) not in modules or not name.endswith(_BIAS):
            copies[name] = copy.tensor
            continue
        if copy.inside != (name.removesuffix(_BIAS) in parts.modules):
            raise FailedPrecondition(
                "peft leaves this bias out when it loads the adapter, because of its name",
                field=f"{WEIGHTS_FILE}: {copy.tensor}",
                wanted="the file as a newer peft saves it",
            )
        base = None if parameter is None else parameter(name)
        if base is None or tuple(base.shape) != checkpoint.tensors[copy.tensor].shape:
            raise FailedPrecondition(
                "the base has no such bias",
                field=f"{WEIGHTS_FILE}: {copy.tensor}",
                found=list(checkpoint.tensors[copy.tensor].shape),
                wanted="none" if base is None else str(list(base.shape)),
            )
    check_base_copies(checkpoint, copies, parameter)


def add_biases(
    checkpoint: Checkpoint,
    parts: FileParts,
    trained: bool,
    edits: MutableMapping[str, ModuleEdit],
    modules: Mapping[str, ModuleShape],
    parameter: BaseParameter | None,
) -> None:
    """Adds the trained biases to the edits, or (trained - the base's) to linear modules' edits.
    Checked before."""
    if not trained or parameter is None:
        return
    biases = {
        name.removesuffix(_BIAS): copy.tensor
        for name, copy in parts.copies.items()
        if name.endswith(_BIAS) and name.removesuffix(_BIAS) in modules
    }
    tensors = checkpoint.load(biases.values())
    for module, tensor in biases.items():
        base = parameter(f"{module}{_BIAS}")
        assert base is not None
        if modules[module].kind is ModuleKind.NORM:
            edits[module] = ModuleEdit(own_bias=tensors[tensor].to(base.dtype))
            continue
        change = tensors[tensor].to(base.dtype).double() - base.detach().cpu().double()
        edit = edits.setdefault(module, ModuleEdit())
        edit.bias = (change if edit.bias is None else edit.bias.double() + change).float()


def zero_where_absent(bias: torch.Tensor | None, size: int) -> torch.Tensor:
    """The bias, or zeros float64 [size]."""
    return torch.zeros(size, dtype=torch.float64) if bias is None else bias
