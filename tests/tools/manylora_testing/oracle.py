"""What is right by definition: transformers + peft, one request at a time, without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Oracle:
    """One base with several peft adapters, asked about one sequence at a time.

    Args:
        model_dir: the base's checkpoint.
        adapters: name → directory of a peft checkpoint.
        dtype: that everything is computed in.
        implementation: transformers' attention implementation.
    """

    def __init__(
        self,
        model_dir: Path,
        adapters: Mapping[str, Path],
        dtype: torch.dtype = torch.float32,
        implementation: str = "eager",
    ) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation=implementation
        )
        for name, directory in adapters.items():
            if isinstance(model, peft.PeftModel):
                model.load_adapter(directory, name)
            else:
                model = peft.PeftModel.from_pretrained(model, directory, adapter_name=name)
        self._model = model.eval()

    @torch.no_grad()
    def logits(self, adapter: str | None, ids: Sequence[int]) -> Tensor:
        """float32 [len(ids), vocab]; adapter None is the base."""
        tokens = torch.tensor([list(ids)])
        if adapter is not None:
            self._model.set_adapter(adapter)
        elif isinstance(self._model, peft.PeftModel):
            with self._model.disable_adapter():
                return self._run(tokens)
        return self._run(tokens)

    def greedy(self, adapter: str | None, prompt: Sequence[int], steps: int) -> list[int]:
        """The `steps` likeliest next tokens, one after the other; no token ends it."""
        ids = list(prompt)
        for _ in range(steps):
            ids.append(int(self.logits(adapter, ids)[-1].argmax()))
        return ids[len(prompt) :]

    def _run(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits[0].float()
        return logits


def peft_logits(model_dir: Path, adapter_dir: Path | None, ids: Sequence[int]) -> Tensor:
    """float32 [len(ids), vocab] of one sequence on one adapter, or on the base."""
    adapters = {} if adapter_dir is None else {"adapter": adapter_dir}
    return Oracle(model_dir, adapters).logits("adapter" if adapters else None, ids)


def peft_greedy(
    model_dir: Path, adapter_dir: Path | None, prompt: Sequence[int], steps: int
) -> list[int]:
    """The `steps` likeliest next tokens of one sequence on one adapter, or on the base."""
    adapters = {} if adapter_dir is None else {"adapter": adapter_dir}
    return Oracle(model_dir, adapters).greedy("adapter" if adapters else None, prompt, steps)
