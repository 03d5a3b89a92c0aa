"""The low-rank part for training on this CPU, beside a loop of torch's products over adapters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from kernels_attention import Beside
from kernels_edits import Case
from kernels_timing import DTYPE, medians

from manylora import kernels
from manylora.kernels import cpu

CASES = (
    Case(512, 4, 16, 576, 1536),
    Case(2048, 4, 16, 576, 1536),
    Case(512, 32, 8, 576, 576),
    Case(512, 4, 64, 4096, 4096),
)


class Training:
    """A case's rows, sorted by adapter, bfloat16; factors and their gradients float32."""

    def __init__(self, case: Case) -> None:
        self.case = case
        slots = np.sort(np.arange(case.rows) % case.adapters).astype(np.int32)
        self.plan = kernels.make_plan(slots)
        self.stack = kernels.make_stack((case.rank,) * case.adapters, (1.0,) * case.adapters)
        self.x, self.dx = torch.randn(2, case.rows, case.in_size).to(DTYPE)
        self.y, self.dy = torch.randn(2, case.rows, case.out_size).to(DTYPE)
        self.a = torch.randn(self.stack.ranks, case.in_size) / case.in_size**0.5
        self.bt = torch.randn(self.stack.ranks, case.out_size) / case.rank**0.5
        self.da, self.dbt = torch.empty_like(self.a), torch.empty_like(self.bt)

    def forward(self, _: int) -> None:
        cpu.add_low_rank_(self.y, self.x, self.a, self.bt, self.stack, self.plan)

    def backward(self, _: int) -> None:
        gradients = (self.dx, self.da, self.dbt)
        saved = (self.dy, self.x, self.a, self.bt)
        cpu.low_rank_backward_(*gradients, *saved, self.stack, self.plan)

    def torch_forward(self, _: int) -> None:
        for rows, ranks in self._parts():
            a, bt = self.a[ranks].to(DTYPE), self.bt[ranks].to(DTYPE)
            self.y[rows] += self.x[rows] @ a.T @ bt

    def torch_backward(self, _: int) -> None:
        for rows, ranks in self._parts():
            a, bt = self.a[ranks].to(DTYPE), self.bt[ranks].to(DTYPE)
            x, dy = self.x[rows], self.dy[rows]
            h, g = x @ a.T, dy @ bt.T
            self.dx[rows] += g @ a
            self.da[ranks] = (g.T @ x).float()
            self.dbt[ranks] = (h.T @ dy).float()

    def _parts(self) -> Iterator[tuple[slice, slice]]:
        """Rows and ranks of each adapter."""
        rows, rank = self.case.rows // self.case.adapters, self.case.rank
        for i in range(self.case.adapters):
            yield slice(i * rows, (i + 1) * rows), slice(i * rank, (i + 1) * rank)


def trainings(budget: float) -> Iterator[Beside]:
    for case in CASES:
        training = Training(case)
        calls = (training.forward, training.torch_forward)
        backward = (training.backward, training.torch_backward)
        times = [t * 1e6 for t in medians([*calls, *backward], budget)]
        yield Beside(f"training, forward, {case}", *times[:2])
        yield Beside(f"training, backward, {case}", *times[2:])
