"""What the low-rank edits cost on this CPU, next to the machine's limit and to plain torch.

    python benchmarks/kernels_edits.py [--threads 2] [--isa avx2] [--quick]

Prints ratios of medians taken in one run, interleaved, because the machine's speed drifts. Weights
are walked through a ring of modules larger than the cache where a line says "cold".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from manylora import kernels
from manylora.kernels import cpu

DTYPE = torch.bfloat16
COLD_BYTES = 256 << 20


class Case:
    """`rows` rows spread over `adapters` adapters, on `modules` modules in -> out."""

    def __init__(
        self, rows: int, adapters: int, rank: int, sizes: tuple[int, int], modules: int
    ) -> None:
        size_in, size_out = sizes
        self.modules = modules
        self.bytes = adapters * rank * (size_in + size_out) * DTYPE.itemsize
        self.a = torch.randn(modules, adapters, rank, size_in, dtype=DTYPE)
        self.b = torch.randn(modules, adapters, size_out, rank, dtype=DTYPE)
        self.x = torch.randn(rows, size_in).to(DTYPE)
        self.y = torch.zeros(rows, size_out, dtype=DTYPE)
        self.index = torch.arange(rows) % adapters
        self.pool, self.table = self._arena(adapters, rank)
        self.groups = [kernels.SliceGroup.single(m, size_out) for m in range(modules)]
        self.plan = kernels.make_plan(self.index.numpy().astype(np.int32))

    def _arena(self, adapters: int, rank: int) -> tuple[torch.Tensor, kernels.EditTable]:
        table = kernels.EditTable(adapters, self.modules)
        packed = torch.stack([cpu.pack_b(b, DTYPE) for b in self.b.flatten(0, 1)])
        packed = packed.view(self.modules, adapters, -1)
        pool = torch.cat([self.a.flatten(2), packed], dim=2).transpose(0, 1).contiguous()
        ranks = np.full(self.modules, rank, np.int32)
        for slot in range(adapters):
            offsets = np.full((self.modules, 5), -1, np.int64)
            offsets[:, 0] = (np.arange(self.modules) + slot * self.modules) * pool.shape[2]
            offsets[:, 1] = offsets[:, 0] + self.a[0, 0].numel()
            table.write(slot, ranks, np.ones(self.modules, np.float32), offsets)
        return pool.flatten(), table

    def edits(self, module: int) -> None:
        cpu.apply_edits_(self.y, self.x, self.groups[module], self.pool, self.table, self.plan)

    def bmm(self, module: int) -> None:
        a, b = self.a[module][self.index], self.b[module][self.index]
        self.y += torch.bmm(b, torch.bmm(a, self.x.unsqueeze(2))).squeeze(2)

    def einsum(self, module: int) -> None:
        a, b = self.a[module][self.index], self.b[module][self.index]
        self.y += torch.einsum("bor,br->bo", b, torch.einsum("bri,bi->br", a, self.x))


def base(rows: int, sizes: tuple[int, int]) -> list[Callable[[int], object]]:
    """F.linear, and oneDNN's product with weights reordered for it where torch has that."""
    x, w = torch.randn(rows, sizes[0]).to(DTYPE), torch.randn(sizes[1], sizes[0]).to(DTYPE)
    calls: list[Callable[[int], object]] = [lambda _: F.linear(x, w)]
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
        calls.append(lambda _: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return calls


def seconds(calls: list[Callable[[int], object]], modules: int, budget: float) -> list[float]:
    """Median time of each call, in turns, each walking through the modules."""
    for call in calls:
        for module in range(min(modules, 3)):
            call(module)
    times: list[list[float]] = [[] for _ in calls]
    end, module = time.perf_counter() + budget, 0
    while time.perf_counter() < end or len(times[0]) < 10:
        for call, found in zip(calls, times, strict=True):
            for _ in range(8):
                module = (module + 1) % modules
                start = time.perf_counter()
                call(module)
                found.append(time.perf_counter() - start)
    return [statistics.median(found[len(found) // 8 :]) for found in times]


def reader() -> tuple[Callable[[int], object], int]:
    """Reads memory beyond the cache with torch's threads, and how many bytes a call."""
    blocks = [torch.ones(1 << 20, dtype=torch.float64) for _ in range(COLD_BYTES >> 23)]
    return lambda module: blocks[module % len(blocks)].sum(), 1 << 23


def line(name: str, value: float, wanted: str, detail: str) -> None:
    print(f"{name:44} {value:7.2f}  {wanted:8} {detail}")


def report_decode(shapes: list[tuple[int, int, int]], budget: float) -> None:
    read, read_bytes = reader()
    for size_in, size_out, rank in shapes:
        each = 32 * rank * (size_in + size_out) * DTYPE.itemsize
        case = Case(32, 32, rank, (size_in, size_out), max(2, COLD_BYTES // each))
        found, reading = seconds([case.edits, read], case.modules, budget)
        limit = case.bytes / read_bytes * reading
        name = f"cold decode 32 x r{rank} {size_in}->{size_out} / limit"
        line(
            name,
            found / limit,
            "<= 1.3",
            f"{found * 1e6:.0f} us at {case.bytes / limit / 1e9:.1f} GB/s",
        )


def report_ratios(budget: float) -> None:
    warm = Case(32, 32, 16, (576, 1536), 1)
    edits, bmm, einsum, *products = seconds(
        [warm.edits, warm.bmm, warm.einsum, *base(32, (576, 1536))], 1, budget
    )
    line(
        "decode 32 x r16 576->1536 / base", edits / min(products), "<= 0.2", f"{edits * 1e6:.1f} us"
    )
    line("bmm on gathered weights / edits", bmm / edits, ">= 8", f"{bmm * 1e6:.0f} us")
    line("gather + einsum / edits", einsum / edits, ">= 15", f"{einsum * 1e6:.0f} us")
    for sizes in ((576, 1536), (1536, 576), (4096, 4096)):
        prefill = Case(256, 1, 16, sizes, 1)
        edits, *products = seconds([prefill.edits, *base(256, sizes)], 1, budget)
        name = f"prefill 256 x 1 of r16 {sizes[0]}->{sizes[1]} / base"
        line(name, edits / min(products), "<= 0.15", f"{edits * 1e6:.1f} us")
    for rows, adapters in ((1, 1), (8, 8), (32, 1), (128, 32)):
        case = Case(rows, adapters, 16, (576, 1536), 1)
        edits, *products = seconds([case.edits, *base(rows, (576, 1536))], 1, budget)
        name = f"{rows} rows of {adapters} r16 576->1536 / base"
        line(name, edits / min(products), "", f"{edits * 1e6:.1f} us")


def report_overhead(budget: float) -> None:
    tiny = Case(1, 1, 1, (1, 1), 1)
    (found,) = seconds([tiny.edits], 1, budget)
    line("a call with next to no work, us", found * 1e6, "<= 3", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default=cpu.current_isa(), choices=cpu.isas())
    parser.add_argument("--quick", action="store_true", help="a rough answer in a few seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu.set_isa(options.isa)
    budget = 0.2 if options.quick else 2.0
    print(f"{options.threads} threads, {options.isa}")
    report_decode([(576, 1536, 16), (576, 1536, 64), (4096, 4096, 16)], budget)
    report_ratios(budget)
    report_overhead(budget)


if __name__ == "__main__":
    main()
