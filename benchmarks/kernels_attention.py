"""What paged attention and the small operations cost on this CPU, next to the machine's limit.

    python benchmarks/kernels_attention.py [--threads 2] [--isa avx2] [--quick]

Prints ratios of medians taken in one run, interleaved, because the machine's speed drifts. Decodes
walk through the caches of several layers, together larger than the processor's cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from manylora.kernels import AttentionBatch, cpu, make_batch
from manylora.kernels.cpu import small

DTYPE = torch.bfloat16
COLD_BYTES = 192 << 20
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def position_bytes(self) -> int:
        """K and V of one position."""
        return 2 * self.kv_heads * self.head_dim * DTYPE.itemsize


SMOLLM2 = Shape(9, 3, 64)
LLAMA3 = Shape(32, 8, 128)


class Step:
    """Sequences that each bring `rows` rows to a context, over the caches of several layers."""

    def __init__(
        self, shape: Shape, sequences: int, context: int, rows: int = 1, shuffled: bool = True
    ) -> None:
        self.bytes = sequences * context * shape.position_bytes
        layers = max(1, COLD_BYTES // self.bytes)
        blocks = -(-context // BLOCK)
        order = np.arange(sequences * blocks)
        if shuffled:
            np.random.default_rng(0).shuffle(order)
        table = order.reshape(sequences, blocks).astype(np.int32)
        counts = np.full(sequences, rows, np.int32)
        self.batch = make_batch(counts, np.full(sequences, context, np.int32), table, BLOCK)
        size = (2, len(order), shape.kv_heads, BLOCK, shape.head_dim)
        self.caches = [torch.randn(size, dtype=DTYPE) for _ in range(layers)]
        self.q = torch.randn(sequences * rows, shape.heads, shape.head_dim, dtype=DTYPE)
        self.scale = shape.head_dim**-0.5

    def attend(self, turn: int) -> None:
        k_cache, v_cache = self.caches[turn % len(self.caches)]
        cpu.paged_attention(self.q, k_cache, v_cache, self.batch, scale=self.scale)


def seconds(calls: list[Callable[[int], object]], budget: float) -> list[float]:
    """Median time of each call, in turns."""
    for call in calls:
        call(0)
    times: list[list[float]] = [[] for _ in calls]
    end, turn = time.perf_counter() + budget, 0
    while time.perf_counter() < end or len(times[0]) < 9:
        for call, found in zip(calls, times, strict=True):
            for _ in range(3):
                turn += 1
                start = time.perf_counter()
                call(turn)
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def reader() -> tuple[Callable[[int], object], int]:
    """Reads memory beyond the cache with torch's threads, and how many bytes a call."""
    blocks = [torch.ones(1 << 20, dtype=torch.float64) for _ in range(COLD_BYTES >> 23)]
    return lambda turn: blocks[turn % len(blocks)].sum(), 1 << 23


def line(name: str, value: float, wanted: str, detail: str) -> None:
    print(f"{name:48} {value:7.2f}  {wanted:7} {detail}")


def report_decode(budget: float) -> None:
    read, read_bytes = reader()
    cases = (
        ("32 x 2000 SmolLM2", "<= 1.3", SMOLLM2, 32, 2000, False),
        ("32 x 2000 SmolLM2, blocks shuffled", "<= 1.3", SMOLLM2, 32, 2000, True),
        ("32 x 160 SmolLM2, blocks shuffled", "", SMOLLM2, 32, 160, True),
        ("1 x 8000 SmolLM2, blocks shuffled", "", SMOLLM2, 1, 8000, True),
        ("8 x 2000 Llama-3-8B, blocks shuffled", "", LLAMA3, 8, 2000, True),
    )
    for name, wanted, shape, sequences, context, shuffled in cases:
        step = Step(shape, sequences, context, shuffled=shuffled)
        found, reading = seconds([step.attend, read], budget)
        limit = step.bytes / read_bytes * reading
        detail = f"{found * 1e6:.0f} us, memory {step.bytes / limit / 1e9:.1f} GB/s"
        line(f"decode {name} / limit", found / limit, wanted, detail)


def base_products(rows: int) -> Callable[[int], object]:
    """The four matrix products of a SmolLM2 layer."""
    shapes = ((576, 960), (576, 576), (576, 3072), (1536, 576))
    pairs = [(torch.randn(rows, i).to(DTYPE), torch.randn(o, i).to(DTYPE)) for i, o in shapes]

    def run(_: int) -> None:
        for x, w in pairs:
            F.linear(x, w)

    return run


def report_prefill(budget: float) -> None:
    for name, sequences, context in (("32 x 128", 32, 128), ("2 x 2000", 2, 2000)):
        step = Step(SMOLLM2, sequences, context, rows=context)
        attend, products = seconds([step.attend, base_products(sequences * context)], budget)
        detail = f"{attend * 1e3:.2f} ms"
        line(f"prefill {name} SmolLM2 / a layer's products", attend / products, "", detail)


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """As transformers' LlamaRMSNorm has it."""
    wide = residual.add_(x).float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    weight * normed.to(DTYPE)


def report_small(budget: float) -> None:
    weight = torch.ones(576, dtype=DTYPE)
    for rows in (1, 32, 4096):
        x, residual = torch.randn(2, rows, 576).to(DTYPE)
        gate_up = torch.randn(rows, 3072).to(DTYPE)
        ours, torchs, gate, torch_gate = seconds(
            [
                lambda _, x=x, r=residual: small.rms_norm(x, weight, 1e-5, r),
                lambda _, x=x, r=residual: torch_rms_norm(x, weight, r),
                lambda _, x=gate_up: small.silu_mul(x),
                lambda _, x=gate_up: F.silu(x[:, :1536]) * x[:, 1536:],
            ],
            budget,
        )
        line(
            f"{rows} rows: torch's add + RMSNorm / ours", torchs / ours, "", f"{ours * 1e6:.1f} us"
        )
        line(
            f"{rows} rows: torch's silu * up / ours", torch_gate / gate, "", f"{gate * 1e6:.1f} us"
        )


def one_row() -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
    """q, a cache and a step of next to no work."""
    one = np.ones(1, np.int32)
    batch = make_batch(one, one, np.zeros((1, 1), np.int32), 1)
    return torch.ones(1, 1, 2, dtype=DTYPE), torch.ones(1, 1, 1, 2, dtype=DTYPE), batch


def report_overhead(budget: float) -> None:
    q, cache, batch = one_row()
    weight, x, both = torch.ones(2, dtype=DTYPE), q[0], torch.ones(1, 2, dtype=DTYPE)
    calls: dict[str, Callable[[int], object]] = {
        "paged_attention": lambda _: cpu.paged_attention(q, cache, cache, batch, scale=1.0),
        "write_kv": lambda _: cpu.write_kv(q, q, cache, cache, batch),
        "rms_norm": lambda _: small.rms_norm(x, weight, 1e-5, x),
        "silu_mul": lambda _: small.silu_mul(both),
        "torch.empty_like": lambda _: torch.empty_like(q),
    }
    for name, found in zip(calls, seconds(list(calls.values()), budget), strict=True):
        line(f"a call with next to no work, us: {name}", found * 1e6, "<= 3", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default=cpu.current_isa(), choices=cpu.isas())
    parser.add_argument("--quick", action="store_true", help="a rough answer in a few seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu.set_isa(options.isa)
    budget = 0.3 if options.quick else 3.0
    print(f"{options.threads} threads, {options.isa}")
    report_decode(budget)
    report_prefill(budget)
    report_small(budget)
    report_overhead(budget)


if __name__ == "__main__":
    main()
