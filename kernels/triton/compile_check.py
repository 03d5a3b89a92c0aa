"""Compiles every kernel for GPUs that need not be here, and holds it against their limits.

    python -m manylora.kernels.triton.compile_check [--targets cuda:90,hip:gfx942] [--models …]

The public functions run as they are, on tensors without memory (device "meta"), for the shapes of
real models; a driver that only names a target makes their launches compile. So tile plan, argument
types and alignment are those of a real step. Prints a table; exits 1 where a kernel spills
registers to memory, wants more shared memory than a block may have, or has an atomic operation,
whose order and so whose sum would change from run to run. Not in the interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import manylora.kernels.triton as kernels
from manylora.kernels import EditTable, SliceGroup, make_batch, make_plan, make_stack
from manylora.kernels.table import IN_SCALE
from manylora.kernels.triton import tiles

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "cuda:120": GPUTarget("cuda", 120, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx950": GPUTarget("hip", "gfx950", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a model that kernels see."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "llama-3-8b": Model(4096, 14336, 32, 8, 128),
    "qwen-2.5-0.5b": Model(896, 4864, 14, 2, 64),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one target.

    spills: bytes of local memory a thread (CUDA: stack; HIP: private segment and vector registers
    spilled). shared, limit: bytes a block. atomics: how many it has.
    """

    kernel: str
    model: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    limit: int
    atomics: int

    @property
    def fits(self) -> bool:
        return self.spills == self.atomics == 0 and self.shared <= self.limit


def check(models: Sequence[str], dtypes: Sequence[str], targets: Sequence[str]) -> list[Compiled]:
    """Every kernel for every combination, each binary once."""
    found: dict[tuple[str, str], Compiled] = {}
    for target, model, dtype in itertools.product(targets, models, dtypes):
        with _compiling_for(TARGETS[target]) as launched:
            for operation in OPERATIONS:
                operation(MODELS[model], DTYPES[dtype])
        for kernel in launched:
            if (target, kernel.hash) not in found:
                limit = tiles.SHARED_BYTES[TARGETS[target].backend, TARGETS[target].arch]
                registers, spills = _resources(kernel)
                found[target, kernel.hash] = Compiled(
                    kernel.metadata.name.lstrip("_"),
                    model,
                    dtype,
                    target,
                    registers,
                    spills,
                    kernel.metadata.shared,
                    limit,
                    kernel.asm["ttir"].count("tt.atomic"),
                )
    return list(found.values())


class _NamedTarget:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        """Kernels are cached by device: one a target."""
        return f"{self._target.backend}:{self._target.arch}"

    def get_current_stream(self, device: str) -> int:  # noqa: ARG002
        return 0


@contextmanager
def _compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Launches compile for the target and do not run; gives the list of what they compiled."""
    launched: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        launched.append(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(_NamedTarget(target))
    tiles.target.cache_clear()
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run
        tiles.target.cache_clear()


def _resources(kernel: Any) -> tuple[int, int]:
    """Registers and spills of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        spilled = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return _number(r"\.vgpr_count:\s*(\d+)", text), spilled + _number(
            r"\.vgpr_spill_count:\s*(\d+)", text
        )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"wanted {pattern} in the compiler's output; found {text[:200]!r}")
    return int(found.group(1))


_ROWS = 64
_RANK = 16


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _edits(model: Model, dtype: torch.dtype) -> None:
    """All projections of a decoder layer, packed as the engine packs them, and in_scale."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    table = EditTable(1, 3, "meta")
    offsets = np.zeros((3, 5), np.int64)
    offsets[:2, IN_SCALE] = -1  # packed projections share their input
    table.write(0, np.full(3, _RANK, np.int32), np.ones(3, np.float32), offsets)
    pool = _meta(1 << 20, dtype=dtype)
    plan = make_plan(np.arange(_ROWS, dtype=np.int32) % 2 - 1, "meta")
    for in_size, sizes in (
        (model.hidden, (q, kv, kv)),
        (q, (model.hidden,)),
        (model.hidden, (model.intermediate, model.intermediate)),
        (model.intermediate, (model.hidden,)),
    ):
        starts = tuple(itertools.accumulate((0, *sizes[:-1])))
        modules = (2,) if len(sizes) == 1 else (0, 1, 1)[: len(sizes)]
        group = SliceGroup(modules, starts, sizes)
        x, y = _meta(_ROWS, in_size, dtype=dtype), _meta(_ROWS, sum(sizes), dtype=dtype)
        kernels.apply_edits_(y, x, group, pool, table, plan)
        weight = _meta(sum(sizes), in_size, dtype=dtype)
        kernels.linear_with_edits(x, weight, weight[:, 0].contiguous(), group, pool, table, plan)


def _training(model: Model, dtype: torch.dtype) -> None:
    """Forward and backward of the low-rank part, of factors in the same dtype and in float32."""
    plan = make_plan(np.arange(_ROWS, dtype=np.int32) % 3 - 1, "meta")
    stack = make_stack((_RANK, 4 * _RANK), (1.0, 2.0), "meta")
    x, y = _meta(_ROWS, model.hidden, dtype=dtype), _meta(_ROWS, model.intermediate, dtype=dtype)
    for its_dtype in (dtype, torch.float32):
        a = _meta(stack.ranks, model.hidden, dtype=its_dtype)
        bt = _meta(stack.ranks, model.intermediate, dtype=its_dtype)
        kernels.add_low_rank_(y, x, a, bt, stack, plan)
        kernels.low_rank_backward_(x, a, bt, y, x, a, bt, stack, plan)


def _attention(model: Model, dtype: torch.dtype) -> None:
    """Decodes and chunks, plain and with everything that models ask for; the KV write."""
    counts = np.array([1, _ROWS - 1], np.int32)
    context = np.array([4000, 1000], np.int32)
    batch = make_batch(counts, context, np.zeros((2, 256), np.int32), 16, "meta")
    cache = _meta(512, model.kv_heads, 16, model.head_dim, dtype=dtype)
    per_head = _meta(model.heads, dtype=torch.float32)
    all_heads = model.heads + 2 * model.kv_heads
    qkv = _meta(_ROWS, all_heads * model.head_dim, dtype=dtype)
    angles = _meta(_ROWS, model.head_dim // 2, dtype=torch.float32)
    q = kernels.rotary_write_kv(qkv, angles, angles, cache, cache, batch)
    k = qkv.view(_ROWS, all_heads, model.head_dim)[:, -model.kv_heads :]
    kernels.write_kv(k, k, cache, cache, batch)
    kernels.paged_attention(q, cache, cache, batch, scale=0.1)
    kernels.paged_attention(
        q,
        cache,
        cache,
        batch,
        scale=0.1,
        window=1024,
        softcap=30.0,
        slopes=per_head,
        sinks=per_head,
    )


def _small(model: Model, dtype: torch.dtype) -> None:
    """Norms with a residual, activations."""
    x, weight = _meta(_ROWS, model.hidden, dtype=dtype), _meta(model.hidden, dtype=dtype)
    kernels.rms_norm(x, weight, 1e-5, x)
    kernels.layer_norm(x, weight, weight, 1e-5, x)
    gate_up = _meta(_ROWS, 2 * model.intermediate, dtype=dtype)
    kernels.silu_mul(gate_up)
    kernels.gelu_mul(gate_up)
    kernels.gelu_mul(gate_up, "tanh")


OPERATIONS: tuple[Callable[[Model, torch.dtype], None], ...] = (
    _edits,
    _training,
    _attention,
    _small,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if something does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, known in (("models", MODELS), ("dtypes", DTYPES), ("targets", TARGETS)):
        parser.add_argument(f"--{name}", default=",".join(known), help="separated by commas")
    chosen = parser.parse_args(arguments)
    rows = check(chosen.models.split(","), chosen.dtypes.split(","), chosen.targets.split(","))
    print(f"{'kernel':<18}{'model':<15}{'dtype':<7}{'target':<12}", end="")
    print(f"{'registers':>10}{'spills':>8}{'shared':>9}{'limit':>9}{'atomics':>9}")
    for row in sorted(rows, key=lambda row: (row.kernel, row.target, row.model, row.dtype)):
        print(f"{row.kernel:<18}{row.model:<15}{row.dtype:<7}{row.target:<12}", end="")
        print(
            f"{row.registers:>10}{row.spills:>8}{row.shared:>9}{row.limit:>9}{row.atomics:>9}",
            end="",
        )
        print("" if row.fits else "  does not fit")
    bad = sum(not row.fits for row in rows)
    print(f"{len(rows)} binaries, {bad} that do not fit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
