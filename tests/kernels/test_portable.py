"""The generic kernels compile for another processor, where this machine has a compiler for one, and
compute there, where it has an emulator, what they compute here."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DTYPES

from manylora.kernels import AttentionBatch, EditTable, SliceGroup, cpu, make_batch, make_plan
from manylora.kernels import make_stack as new_stack
from manylora.kernels.cpu import attention, edits, library, product, small, training
from manylora.kernels.stack import RankStack

SOURCES = Path(__file__).resolve().parents[2] / "kernels/cpu"
DRIVER = Path(__file__).resolve().parents[1] / "tools/call_kernels.cpp"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
FLAGS = (
    *("-std=c++17", "-O1", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti"),
    *("-Wall", "-Wextra", "-Werror", "-fPIC"),
)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DEFINES = ("-DMANYLORA_ISA=generic",)
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="aarch64-linux-gnu-g++ is not installed"),
    pytest.mark.slow,
]


def build(target: Path, *options: str) -> None:
    """Of all sources: what is not there, or only there for x86, does not link."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    command = [str(COMPILER), *FLAGS, *DEFINES, *options, "-o", str(target), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


class Shared:
    """Memory in a file, at an address that another process can have, too (call_kernels.cpp)."""

    ADDRESS, SIZE = 0x1000000000, 16 << 20

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(self.SIZE))
        self.path = path
        self.used = 0
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        self._unmap = lambda: libc.munmap(ctypes.c_void_p(self.ADDRESS), ctypes.c_size_t(self.SIZE))
        file = os.open(path, os.O_RDWR)
        found = libc.mmap(
            ctypes.c_void_p(self.ADDRESS),
            ctypes.c_size_t(self.SIZE),
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | 0x100000,  # MAP_FIXED_NOREPLACE
            file,
            ctypes.c_long(0),
        )
        os.close(file)
        assert found == self.ADDRESS

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor in here."""
        size = tensor.numel() * tensor.itemsize
        memory = (ctypes.c_uint8 * max(1, size)).from_address(self._room(size))
        flat = torch.frombuffer(memory, dtype=torch.uint8)[:size].view(tensor.dtype)
        flat.copy_(tensor.flatten())
        return flat.view(tensor.shape)

    def argument(self, value: Any, tensors: dict[int, torch.Tensor]) -> Any:
        """An argument of a kernel as the other process gets it: of a tensor, by its `_cdata`, its
        facts (call_kernels.cpp); what lies elsewhere, a plan or a structure, is copied."""
        if isinstance(value, float):
            return value
        if value in tensors:
            return self.facts(tensors[value])
        number = int(value or 0)
        if number < 1 << 32 or self.ADDRESS <= number < self.ADDRESS + self.SIZE:
            return number
        size = 1024
        address = self._room(size)
        ctypes.memmove(address, number, size)
        return address

    def facts(self, tensor: torch.Tensor) -> int:
        padding = [0] * (4 - tensor.ndim)
        sizes, strides = [*tensor.shape, *padding], [*tensor.stride(), *padding]
        head = [tensor.data_ptr(), library.DTYPES[tensor.dtype], tensor.ndim]
        return self.put(torch.tensor([*head, *sizes, *strides])).data_ptr()

    def close(self) -> None:
        self._unmap()

    def _room(self, size: int) -> int:
        start = self.used + -self.used % 64
        self.used = start + size
        assert self.used <= self.SIZE
        return self.ADDRESS + start


Call = tuple[str, Callable[..., bool], list[Any], list[Any]]
"""A kernel's name; itself, its arguments here; its arguments in the other process."""
KERNELS = (
    *((edits, "_apply", "apply_edits"), (edits, "_scale_rows", "scale_rows")),
    *((attention, "_attend", "paged_attention"), (attention, "_write", "write_kv")),
    *((small, "_rms_norm", "rms_norm"), (small, "_layer_norm", "layer_norm")),
    *((small, "_act_mul", "act_mul"), (small, "_rotary", "rotary_write_kv")),
    *((training, "_forward", "add_low_rank"), (training, "_backward", "low_rank_backward")),
    (product, "_linear", "linear"),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, shared: Shared) -> list[Call]:
    """The calls of C++ that would be made; results and scratch lie in shared memory."""
    made: list[Call] = []
    tensors: dict[int, torch.Tensor] = {}  # by `_cdata`; alive, so that no other gets the same
    cdata = torch._C.TensorBase._cdata

    def remember(tensor: torch.Tensor) -> int:
        address = cdata.__get__(tensor)
        tensors[address] = tensor
        return int(address)

    for module, attribute, name in KERNELS:
        kernel = getattr(module, attribute)

        def record(*args: Any, name: str = name, kernel: Callable[..., bool] = kernel) -> bool:
            there = [shared.argument(arg, tensors) for arg in args]
            pairs = zip(args, there, strict=True)
            here = [a if a in tensors else b for a, b in pairs]
            made.append((name, kernel, here, there))
            return True

        monkeypatch.setattr(module, attribute, record)
    monkeypatch.setattr(torch.Tensor, "_cdata", property(remember), raising=False)
    empty, new_empty, clone = torch.empty, torch.Tensor.new_empty, torch.Tensor.clone
    monkeypatch.setattr(torch, "empty", lambda *a, **k: shared.put(empty(*a, **k).fill_(7)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *a, **k: shared.put(new_empty(x, *a, **k).fill_(7))
    )
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **_: shared.put(empty(x.shape, dtype=x.dtype).fill_(7))
    )
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **k: shared.put(clone(x, **k)))
    return made


@pytest.fixture
def generic() -> Iterator[None]:
    before = cpu.current_isa()
    cpu.set_isa("generic")
    yield
    cpu.set_isa(before)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    memory = Shared(tmp_path / "memory")
    yield memory
    memory.close()


def bits_of(argument: float) -> int:
    """The 8 bytes of an argument, as `library.kernel` packs it."""
    kind = "d" if isinstance(argument, float) else "q"
    (bits,) = struct.unpack("q", struct.pack(kind, argument))
    return int(bits)


class Inputs:
    """Calls of every kernel on random tensors in shared memory; results: what they write."""

    def __init__(self, shared: Shared, dtype: torch.dtype) -> None:
        self.shared, self.dtype = shared, dtype
        self.results: list[torch.Tensor] = []
        self._random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self._random)
        return self.shared.put(drawn.to(dtype or self.dtype))

    def edit(self) -> None:
        """Ranks mixed, an adapter with everything, one that scales its input, a base row."""
        sizes, in_size, ranks = (70, 33), 45, (5, 16, 0)
        table, parts, end = EditTable(3, 2), [], 0
        for slot, rank in enumerate(ranks):
            offsets = np.full((2, 5), -1, np.int64)
            for module, size in enumerate(sizes):
                tensors: dict[int, torch.Tensor] = {}
                if rank:
                    b = torch.randn(size, rank, generator=self._random).to(self.dtype)
                    a = torch.randn(rank, in_size, generator=self._random).to(self.dtype)
                    tensors = {0: cpu.pack_a(a, self.dtype), 1: cpu.pack_b(b, self.dtype)}
                if slot == 1:
                    vector = torch.randn(size, generator=self._random).view(self.dtype)
                    tensors |= {3: vector, 4: vector}
                if slot == 2 and module == 0:
                    tensors[2] = torch.randn(in_size, generator=self._random).view(self.dtype)
                for column, tensor in tensors.items():
                    offsets[module, column] = end
                    parts.append(torch.nn.functional.pad(tensor, (0, -len(tensor) % 32)))
                    end += len(parts[-1])
            table.write(slot, np.full(2, rank, np.int32), np.full(2, 0.5, np.float32), offsets)
        for name in ("rank", "scale", "offsets"):
            setattr(table, name, self.shared.put(getattr(table, name)))
        table._lie_on(table.rank, table.scale, table.offsets)
        pool = self.shared.put(torch.cat(parts))
        row_slots = np.array([1, 0, -1, 1, 2, *([1] * 9)], np.int32)
        plan = make_plan(row_slots)
        x, y = self.normal(len(row_slots), in_size), self.normal(len(row_slots), sum(sizes))
        cpu.apply_edits_(y, x, SliceGroup((0, 1), (0, 70), sizes), pool, table, plan)
        scaled = cpu.scale_inputs(x, SliceGroup.single(0, 70), pool, table, plan)
        self.results += [y, scaled]

    def attend(self) -> None:
        """A decode and a chunk: keys and values written, plain and rotated; all options."""
        made = make_batch(
            np.array([1, 20], np.int32),
            np.array([90, 30], np.int32),
            np.arange(12, dtype=np.int32).reshape(2, 6),
            16,
        )
        names = ("seq_starts", "context", "block_table", "slot_mapping")
        batch = AttentionBatch(*(self.shared.put(getattr(made, name)) for name in names))
        caches = self.normal(12, 2, 16, 8), self.normal(12, 2, 16, 8)
        per_head, angles = (
            self.normal(4, dtype=torch.float32),
            self.normal(21, 3, dtype=torch.float32),
        )
        qkv, k, q = self.normal(21, 8 * 8), self.normal(21, 2, 8), self.normal(21, 4, 8)
        cpu.write_kv(k, k, *caches, batch)
        extras = {"slopes": per_head, "sinks": per_head, "window": 21, "softcap": 5.0}
        plain = cpu.paged_attention(q, *caches, batch, scale=0.3)
        with_all = cpu.paged_attention(q, *caches, batch, scale=0.3, **extras)
        rotated = self.normal(12, 2, 16, 8), self.normal(12, 2, 16, 8)
        cpu.rotary_write_kv(qkv, angles, angles, *rotated, batch)
        self.results += [*caches, plain, with_all, qkv, *rotated]

    def small(self) -> None:
        x, weight = self.normal(3, 70), self.normal(70)
        normed = cpu.rms_norm(x, weight, 1e-5, self.normal(3, 70), 1.0)
        shifted = cpu.layer_norm(x, weight, weight, 1e-5, self.normal(3, 70))
        gated = cpu.silu_mul(x), cpu.gelu_mul(x), cpu.gelu_mul(x, "tanh")
        self.results += [*normed, *shifted, *gated]

    def multiply(self) -> None:
        """The base's product, of bfloat16 only: panels that are not full, tiles of every size."""
        if self.dtype != torch.bfloat16:
            return
        weight = cpu.PackedWeight(
            torch.randn(70, 64, generator=self._random).bfloat16(), cpu.HugeArena()
        )
        weight.panels = self.shared.put(weight.panels)
        self.results += [
            cpu.linear(self.normal(n, 64), weight, self.normal(70)) for n in (1, 2, 3, 7)
        ]

    def train(self) -> None:
        stack = new_stack((5, 0, 16), (0.5, 1.0, -1.0))
        starts, scale = self.shared.put(stack.starts), self.shared.put(stack.scale)
        stack = RankStack(stack.slots, stack.ranks, stack.max_rank, starts, scale)
        plan = make_plan(np.array([2, 0, -1, 1, *([2] * 70)], np.int32))
        a, bt, x, y = (self.normal(*s) for s in ((21, 45), (21, 33), (74, 45), (74, 33)))
        cpu.add_low_rank_(y, x, a, bt, stack, plan)
        gradients = self.normal(74, 45), self.normal(21, 45), self.normal(21, 33)
        cpu.low_rank_backward_(*gradients, self.normal(74, 33), x, a, bt, stack, plan)
        self.results += [y, *gradients]


@pytest.mark.skipif(not library.available(), reason=library.why_unavailable())
@pytest.mark.usefixtures("generic")
def test_on_aarch64(calls: list[Call], shared: Shared, tmp_path: Path) -> None:
    """Every kernel that stands by itself, in every dtype it has, on the same memory here and in the
    emulator: as much the same as sums with fused multiply-adds are, which this machine's generic
    code has not."""
    program, list_of_calls = tmp_path / "kernels", tmp_path / "calls"
    build(program, "-static", f"-I{SOURCES}", str(DRIVER))
    if EMULATOR is None:
        pytest.skip("compiled, and not run: qemu-aarch64 is not installed")
    results: list[torch.Tensor] = []
    for dtype in DTYPES:
        inputs = Inputs(shared, dtype)
        for make in (inputs.edit, inputs.attend, inputs.small, inputs.train, inputs.multiply):
            make()
        results += inputs.results
    assert {name for name, *_ in calls} == {name for _, _, name in KERNELS}
    before = shared.path.read_bytes()
    for _, kernel, args, _ in calls:
        assert kernel(*args)
    here = [result.double() for result in results]
    ctypes.memmove(shared.ADDRESS, before, len(before))
    initial = [result.double() for result in results]

    lines = []
    for name, _, _, args in calls:
        packed = [bits_of(arg) for arg in args]
        lines.append(" ".join([name, *map(str, packed + [0] * (20 - len(packed)))]))
    list_of_calls.write_text("\n".join(lines))
    command = [str(EMULATOR), str(program), str(shared.path), str(list_of_calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [name for name, *_ in calls]
    for result, wanted, start in zip(results, here, initial, strict=True):
        assert wanted.isfinite().all()
        unit = 16 * UNIT_ROUNDOFF[result.dtype]
        torch.testing.assert_close(
            result.double(), wanted, rtol=unit, atol=unit * float(wanted.abs().max())
        )
        assert not torch.equal(wanted, start), "nothing was computed"
