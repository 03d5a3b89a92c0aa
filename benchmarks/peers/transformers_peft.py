"""transformers + peft, bfloat16, `generate`: a batch of several adapters goes through
`adapter_names`, one of a single adapter or of none as usual."""

from __future__ import annotations

import time
from typing import Any

import peft
import torch
import transformers
from protocol import Batch, Outcome, Run, Spec, serve


class Clock(transformers.LogitsProcessor):
    """Notes when each step's logits are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002
        self.times.append(time.perf_counter())
        return scores


class Model:
    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(spec.threads)
        base = transformers.AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.bfloat16)
        self.model: Any = base
        for i, path in enumerate(spec.adapters):
            if i == 0:
                self.model = peft.PeftModel.from_pretrained(base, path, adapter_name="a0")
            else:
                self.model.load_adapter(path, adapter_name=f"a{i}")
        self.model.eval()

    def answer(self, batch: Batch) -> list[float]:
        """The time of each of the answers' tokens, which come in step."""
        if all(pick < 0 for pick in batch.picks):
            if not isinstance(self.model, peft.PeftModel):
                return self._generate(batch)
            with self.model.disable_adapter():
                return self._generate(batch)
        names = [f"a{pick}" if pick >= 0 else "__base__" for pick in batch.picks]
        if len(set(names)) > 1:
            return self._generate(batch, adapter_names=names)
        self.model.set_adapter(names[0])
        return self._generate(batch)

    def _generate(self, batch: Batch, **adapter_names: Any) -> list[float]:
        ids, clock = torch.tensor(batch.prompts), Clock()
        with torch.inference_mode():
            answer = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=batch.output_tokens,
                max_new_tokens=batch.output_tokens,
                logits_processor=transformers.LogitsProcessorList([clock]),
                **adapter_names,
            )
        assert answer.shape[1] == ids.shape[1] + batch.output_tokens
        return clock.times


def start(spec: Spec) -> tuple[Run, dict[str, Any]]:
    model = Model(spec)

    def run(batch: Batch) -> Outcome:
        begin = time.perf_counter()
        return outcome(batch, begin, [model.answer(batch)] * len(batch.prompts))

    return run, versions()


def start_serial(spec: Spec) -> tuple[Run, dict[str, Any]]:
    """One request after the other, the adapter switched in between."""
    model = Model(spec)

    def run(batch: Batch) -> Outcome:
        begin = time.perf_counter()
        alone = (
            Batch([prompt], [pick], batch.output_tokens)
            for prompt, pick in zip(batch.prompts, batch.picks, strict=True)
        )
        return outcome(batch, begin, [model.answer(request) for request in alone])

    return run, versions()


def outcome(batch: Batch, begin: float, times: list[list[float]]) -> Outcome:
    """times: of each request's tokens."""
    return Outcome(
        time.perf_counter() - begin,
        len(times) * batch.output_tokens,
        [found[0] - begin for found in times],
        [found[-1] - begin for found in times],
    )


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    serve(start)
