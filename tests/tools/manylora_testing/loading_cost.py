"""What it costs to load an adapter, by PEFT method.

`python -m manylora_testing.loading_cost` prints milliseconds of reading, lowering and packing, and
bytes that stay resident, for two decoder layers of Llama's kind, 1024 wide, in float32.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from manylora import kernels
from manylora.adapters_store.format import read_checkpoint
from manylora.adapters_store.lowering import lower
from manylora.server.engine.model import load_model
from manylora.server.engine.packing import pack
from manylora_testing.methods import make_method, methods_of
from manylora_testing.models import tiny_model

_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = tiny_model("llama", directory / "base", **_SIZES)
        base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        backend = kernels.select(torch.device("cpu"), None)
        model = load_model(path, "float32", torch.device("cpu"), backend)
        ids = {module: i for i, module in enumerate(model.modules)}
        for method in methods_of("llama"):
            adapter = make_method(method, "llama", base, directory / method)
            start = time.perf_counter()
            lowered = lower(read_checkpoint(adapter), model.modules, model.parameter)
            packed = pack(lowered, ids, backend, model.dtype)
            seconds = time.perf_counter() - start
            rank = max((edit.rank for edit in lowered.edits.values()), default=0)
            file = (adapter / "adapter_model.safetensors").stat().st_size
            print(f"| {method} | {rank} | {1e3 * seconds:.1f} | {file / 1e6:.2f} | "
                  f"{packed.bytes / 1e6:.2f} |", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
