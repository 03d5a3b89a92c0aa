"""What the engine is told at start. The CLI's settings turn into this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True, frozen=True)
class EngineSettings:
    model: Path  # directory of a Hugging Face checkpoint
    model_name: str = ""  # what clients see; default: the directory's name
    dtype: str = "auto"  # "auto" (the checkpoint's), "float32", "float16", "bfloat16"
    quantization: str = "none"  # or "int8": 8-bit weights, made at load, on a CPU
    device: str = "auto"  # "auto" (the best there is), "cpu", "cuda"
    kernels: str = "auto"  # "auto" (the device's best) or a backend's name
    max_context: int = 0  # tokens of prompt and answer; 0: the model's own limit
    block_size: int = 16  # KV positions per block; the CPU's kernels want a multiple of 16
    kv_cache_bytes: int = 1 << 30
    max_batch_tokens: int = 512  # rows in a step
    max_sequences: int = 64  # running at once
    max_waiting: int = 1024  # queue length before RESOURCE_EXHAUSTED
    adapter_bytes: int = 1 << 30  # the pool's size
    max_adapters: int = 256  # slots
    loader_threads: int = 2
    prefix_cache: bool = True
