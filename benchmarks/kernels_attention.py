"""Paged attention and the small operations of a step on this CPU, and what a call costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from kernels_timing import DTYPE, READ_BYTES, Call, Ring, medians

from manylora import kernels
from manylora.kernels import cpu
from manylora.kernels.cpu import small

BLOCK = 16


@dataclass(frozen=True, slots=True)
class Heads:
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def position_bytes(self) -> int:
        """K and V of one position."""
        return 2 * self.kv_heads * self.head_dim * DTYPE.itemsize


SMOLLM2 = Heads(9, 3, 64)
LLAMA3 = Heads(32, 8, 128)


class Attention:
    """Sequences that each bring `rows` rows to a context, over the caches of as many layers as the
    ring holds. shuffled: blocks lie in any order."""

    def __init__(
        self,
        of: Heads,
        sequences: int,
        context: int,
        ring: Ring,
        rows: int = 1,
        layers: int = 64,
        shuffled: bool = True,
    ) -> None:
        blocks = -(-context // BLOCK)
        self.nbytes = sequences * context * of.position_bytes
        order = np.arange(sequences * blocks, dtype=np.int32)
        if shuffled:
            np.random.default_rng(0).shuffle(order)
        counts = np.full(sequences, rows, np.int32)
        contexts = np.full(sequences, context, np.int32)
        self.batch = kernels.make_batch(counts, contexts, order.reshape(sequences, blocks), BLOCK)
        size = (len(order), of.kv_heads, BLOCK, of.head_dim)
        numel = int(np.prod(size))
        ring.fill()
        starts = ring.walk(2 * numel, layers)
        self.caches = [ring.values[at : at + 2 * numel].view(2, *size) for at in starts]
        self.q = torch.randn(sequences * rows, of.heads, of.head_dim).to(DTYPE)
        self.scale = of.head_dim**-0.5

    def ours(self, turn: int) -> None:
        k_cache, v_cache = self.caches[turn % len(self.caches)]
        cpu.paged_attention(self.q, k_cache, v_cache, self.batch, scale=self.scale)


@dataclass(frozen=True, slots=True)
class Decode:
    """us: microseconds a layer. limit: reading its keys and values once."""

    name: str
    us: float
    limit: float


DECODES = (
    ("32 x 2000 SmolLM2", SMOLLM2, 32, 2000),
    ("32 x 160 SmolLM2", SMOLLM2, 32, 160),
    ("1 x 8000 SmolLM2", SMOLLM2, 1, 8000),
    ("32 x 2000 Llama-3-8B", LLAMA3, 32, 2000),
)


def decodes(ring: Ring, budget: float) -> Iterator[Decode]:
    for name, of, sequences, context in DECODES:
        step = Attention(of, sequences, context, ring)
        found, read = medians([step.ours, ring.reader()], budget)
        yield Decode(name, found * 1e6, step.nbytes * read / READ_BYTES * 1e6)


@dataclass(frozen=True, slots=True)
class Beside:
    """An operation in microseconds, ours and torch's."""

    name: str
    ours: float
    torchs: float


def besides(ring: Ring, budget: float) -> Iterator[Beside]:
    """Prefill attention of one long prompt, norms, activations."""
    prompt = Attention(SMOLLM2, 1, 1024, ring, rows=1024, layers=1)
    q, k, v = (torch.randn(1, n, 1024, 64).to(DTYPE) for n in (9, 3, 3))
    yield _beside(
        "prefill attention, 1 x 1024 rows, SmolLM2",
        prompt.ours,
        lambda _: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        budget,
    )
    weight = torch.ones(576, dtype=DTYPE)
    for rows in (1, 32, 1024):
        x, residual = torch.randn(2, rows, 576).to(DTYPE)
        both = torch.randn(rows, 3072).to(DTYPE)
        yield _beside(
            f"residual + RMSNorm, {rows} rows of 576",
            lambda _, x=x, r=residual: small.rms_norm(x, weight, 1e-5, r),  # type: ignore[misc]
            lambda _, x=x, r=residual: _rms_norm(x, weight, r),  # type: ignore[misc]
            budget,
        )
        yield _beside(
            f"SiLU * up, {rows} rows of 1536",
            lambda _, x=both: small.silu_mul(x),  # type: ignore[misc]
            lambda _, x=both: F.silu(x[:, :1536]) * x[:, 1536:],  # type: ignore[misc]
            budget,
        )


def _beside(name: str, ours: Call, torchs: Call, budget: float) -> Beside:
    found, its = medians([ours, torchs], budget)
    return Beside(name, found * 1e6, its * 1e6)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """As transformers' LlamaRMSNorm has it."""
    wide = residual.add_(x).float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * normed.to(DTYPE)


@dataclass(frozen=True, slots=True)
class Calls:
    """Microseconds: of torch's making of an output, and of each call beyond its work."""

    torchs: float
    ours: dict[str, float]


def call_costs(budget: float) -> Calls:
    """Calls from Python that have no rows, or for edits a row whose adapter leaves the module
    alone, less a call that does nothing, or torch's that makes the output, where there is one."""
    none = np.zeros(0, np.int32)
    batch = kernels.make_batch(none, none, np.zeros((0, 1), np.int32), BLOCK)
    q, cache = torch.ones(0, 1, 2, dtype=DTYPE), torch.ones(1, 1, BLOCK, 2, dtype=DTYPE)
    x, both = torch.ones(0, 2, dtype=DTYPE), torch.ones(0, 4, dtype=DTYPE)
    row, plan = torch.ones(1, 2, dtype=DTYPE), kernels.make_plan(np.zeros(1, np.int32))
    group, table = kernels.SliceGroup.single(0, 2), kernels.EditTable(1, 1)
    weight = torch.ones(2, dtype=DTYPE)
    in_place: dict[str, Call] = {
        "apply_edits_": lambda _: cpu.apply_edits_(row, row, group, row, table, plan),
        "write_kv": lambda _: cpu.write_kv(q, q, cache, cache, batch),
    }
    with_output: dict[str, Call] = {
        "paged_attention": lambda _: cpu.paged_attention(q, cache, cache, batch, scale=1.0),
        "rms_norm": lambda _: small.rms_norm(x, weight, 1e-5, x),
        "silu_mul": lambda _: small.silu_mul(both),
    }
    empty: list[Call] = [lambda _: None, lambda _: torch.empty_like(x)]
    nothing, output, *found = medians([*empty, *in_place.values(), *with_output.values()], budget)
    names = [*in_place, *with_output]
    beyond = {
        name: (us - (output if name in with_output else nothing)) * 1e6
        for name, us in zip(names, found, strict=True)
    }
    return Calls(output * 1e6, beyond)
