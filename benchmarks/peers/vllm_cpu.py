"""vLLM's CPU build, as fast as its settings make it: compiled (without LoRA; with it, vLLM itself
switches that off), 512 tokens a step, an adapter slot for every adapter there is memory for."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from protocol import Batch, Outcome, Run, Spec, serve

KV_CACHE_GIB = 1


def preloads() -> list[str]:
    """The libraries that vLLM's own guide to the CPU says to preload, where they are installed."""
    intel_openmp = Path(sys.prefix, "lib", "libiomp5.so")
    tcmalloc = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
    return [str(library) for library in (tcmalloc, intel_openmp) if library.exists()]


def start(spec: Spec) -> tuple[Run, dict[str, Any]]:
    os.environ |= {
        "LD_PRELOAD": ":".join(filter(None, (os.environ.get("LD_PRELOAD"), *preloads()))),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.pop("OMP_NUM_THREADS", None)
    import vllm  # noqa: PLC0415
    from vllm.lora.request import LoRARequest  # noqa: PLC0415

    lora: dict[str, Any] = {}
    if spec.adapters:
        lora = {
            "enable_lora": True,
            "max_loras": spec.resident,
            "max_lora_rank": max(8, spec.max_rank),
            "max_cpu_loras": len(spec.adapters),
        }
    engine = vllm.LLM(
        spec.model,
        dtype="bfloat16",
        max_model_len=spec.context,
        max_num_seqs=spec.sequences,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **lora,
    )
    adapters = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(spec.adapters)]

    def run(batch: Batch) -> Outcome:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=batch.output_tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        answers = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in batch.prompts],
            sampling,
            use_tqdm=False,
            lora_request=[None if pick < 0 else adapters[pick] for pick in batch.picks]
            if adapters
            else None,
        )
        seconds = time.perf_counter() - begin
        stats = [answer.metrics for answer in answers]
        first = [s.first_token_latency for s in stats]
        return Outcome(
            seconds,
            sum(len(answer.outputs[0].token_ids) for answer in answers),
            first,
            [f + s.last_token_ts - s.first_token_ts for f, s in zip(first, stats, strict=True)],
        )

    return run, {"version": vllm.__version__, "preloads": list(map(os.path.basename, preloads()))}


if __name__ == "__main__":
    serve(start)
