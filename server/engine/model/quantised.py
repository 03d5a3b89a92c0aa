"""Bases with weights of 4 or 8 bits, by bitsandbytes; an adapter's edits are added to the product
as to any other.

Papers: Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339); Dettmers et al. 2023, QLoRA
(arXiv:2305.14314). Weights are never quantised here, only read as the checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from manylora.errors import FailedPrecondition, MissingExtra

FOUR_BITS, EIGHT_BITS = "Linear4bit", "Linear8bitLt"

_PACKAGES = ("bitsandbytes", "accelerate")


def quantisation(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """What config.json says of it; None for a base that is not quantised."""
    found: Any = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def check_quantisation(config: PreTrainedConfig) -> None:
    """Raises FailedPrecondition for a quantised base of another kind, MissingExtra where
    bitsandbytes is not installed."""
    found = quantisation(config)
    if found is None:
        return
    if found.get("quant_method") != "bitsandbytes" or found.get("llm_int8_has_fp16_weight"):
        raise FailedPrecondition(
            "a base quantised in this way is not served",
            field="model",
            found=f"{config.model_type}: {found.get('quant_method')}",
            wanted="bitsandbytes, with weights of 4 or 8 bits",
        )
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingExtra(
            f"a quantised base needs {' and '.join(missing)}", wanted="pip install 'manylora[bnb]'"
        )


def is_quantised(module: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' two linear modules."""
    kind = type(module)
    known = kind.__name__ in (FOUR_BITS, EIGHT_BITS)
    return known and kind.__module__.partition(".")[0] == "bitsandbytes"


def is_quantised_base(model: PreTrainedModel) -> bool:
    return quantisation(model.config) is not None


def settle(model: PreTrainedModel) -> PreTrainedModel:
    """Before the first forward pass: keeps 4-bit weights in the form that can be dequantised, in
    which products have the dtype that the checkpoint asks for. (bitsandbytes 0.50 packs them anew
    on CPUs with AVX512-BF16, multiplies in bfloat16 and dequantises nonsense then.)

    Raises FailedPrecondition for 4-bit weights that bitsandbytes 0.50 reads wrongly on a CPU: those
    whose rows are not whole blocks.
    """
    for name, module in model.named_modules():
        if not is_quantised(module) or type(module).__name__ != FOUR_BITS:
            continue
        module.support_avx512bf16_for_cpu = False
        block = module.weight.quant_state.blocksize
        if module.weight.device.type == "cpu" and module.in_features % block:
            raise FailedPrecondition(
                "bitsandbytes dequantises these weights wrongly on a CPU",
                field="model",
                found=f"{name}, rows of {module.in_features} in blocks of {block}",
                wanted="rows of whole blocks, or a GPU",
            )
    return model


def weight(module: Any) -> Tensor:
    """The dequantised weight, float32 [out, in]."""
    from bitsandbytes import functional  # noqa: PLC0415

    if type(module).__name__ == FOUR_BITS:
        made: Tensor = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return made.float()
    state = _eight_bits(module)
    made = functional.int8_vectorwise_dequant(state.CB, state.SCB)
    return made.float()


def product(module: Any, x: Tensor) -> Tensor:
    """The module's own result: [..., in] → [..., out].

    Of 8-bit weights as if each row came alone: bitsandbytes takes a column out of all rows'
    8-bit products where any row has an outlier in it, so that a row's result would depend on
    those beside it.
    """
    if type(module).__name__ == FOUR_BITS:
        y: Tensor = module(x)
        return y
    rows = x.reshape(-1, x.shape[-1])
    return _eight_bit_product(module, rows).view(*x.shape[:-1], -1)


def _eight_bit_product(module: Any, rows: Tensor) -> Tensor:
    from bitsandbytes import functional  # noqa: PLC0415

    state = _eight_bits(module)
    halves = rows.to(torch.float16)
    threshold = state.threshold or torch.inf
    outlying = halves.abs() >= threshold
    ints, sizes, _ = functional.int8_vectorwise_quant(halves.masked_fill(outlying, 0))
    bias = None if module.bias is None else module.bias.to(rows.dtype)
    y: Tensor = torch.ops.bitsandbytes.int8_scaled_mm.default(
        ints, state.CB, sizes, state.SCB, bias=bias, dtype=rows.dtype
    )
    columns = outlying.any(dim=0).nonzero().flatten()
    if len(columns) == 0:
        return y
    own = rows.masked_fill(~outlying, 0)[:, columns]
    weights = functional.int8_vectorwise_dequant(state.CB[:, columns].contiguous(), state.SCB)
    return y.addmm(own, weights.to(rows.dtype).T)


def _eight_bits(module: Any) -> Any:
    """The module's state, which has CB int8 [out, in] and SCB float32 [out]."""
    if module.weight.CB is not None:
        module.init_8bit_state()
    return module.state
