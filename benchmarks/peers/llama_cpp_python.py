"""llama.cpp through llama-cpp-python: the base's own speed, on the same bfloat16 weights. Through
its low-level interface, which alone decodes a batch of sequences."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from llama_gguf import write_gguf
from protocol import Batch, Outcome, Run, Spec, serve

BATCH_TOKENS = 512  # in one call of llama_decode


class Model:
    def __init__(self, spec: Spec) -> None:
        file = Path(spec.scratch) / f"{Path(spec.model).name}.bf16.gguf"
        if not file.exists():
            write_gguf(Path(spec.model), file)
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx = spec.sequences * spec.context
        settings.n_seq_max = spec.sequences
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = spec.threads
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.context = lib.llama_init_from_model(model, settings)
        self.rows = lib.llama_batch_init(BATCH_TOKENS, 0, 1)

    def forget(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def step(self, work: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """work: (token, position, sequence, whether the next one is wanted). Returns the likeliest
        next token of each sequence that wants one."""
        rows = self.rows
        rows.n_tokens = len(work)
        for i, (token, position, sequence, wanted) in enumerate(work):
            rows.token[i], rows.pos[i], rows.logits[i] = token, position, wanted
            rows.n_seq_id[i], rows.seq_id[i][0] = 1, sequence
        if lib.llama_decode(self.context, rows) != 0:
            raise RuntimeError("llama_decode failed")
        return {
            sequence: self._likeliest(i)
            for i, (_, _, sequence, wanted) in enumerate(work)
            if wanted
        }

    def _likeliest(self, row: int) -> int:
        logits = lib.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


def start(spec: Spec) -> tuple[Run, dict[str, Any]]:
    model = Model(spec)

    def run(batch: Batch) -> Outcome:
        begin = time.perf_counter()
        model.forget()
        work = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(batch.prompts)
            for position, token in enumerate(prompt)
        ]
        newest: dict[int, int] = {}
        first: list[float] = []
        for i in range(0, len(work), BATCH_TOKENS):
            found = model.step(work[i : i + BATCH_TOKENS])
            newest |= found
            first += [time.perf_counter() - begin] * len(found)
        for past in range(batch.output_tokens - 1):
            newest = model.step(
                [(token, len(batch.prompts[s]) + past, s, True) for s, token in newest.items()]
            )
        seconds = time.perf_counter() - begin
        tokens = len(batch.prompts) * batch.output_tokens
        return Outcome(seconds, tokens, first, [seconds] * len(first))

    return run, {"version": lib.__version__}


if __name__ == "__main__":
    serve(start)
