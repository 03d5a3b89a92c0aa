"""Residency with adapters made in memory, whose loads end when the test says so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from queue import SimpleQueue

import torch

from manylora.adapters_store.edits import LoweredAdapter, ModuleEdit
from manylora.errors import ManyloraError
from manylora.kernels import EditTable, reference
from manylora.server.engine.mailbox import Loaded
from manylora.server.engine.model.overrides import Overrides
from manylora.server.engine.packing import PackedAdapter, pack
from manylora.server.engine.placement import Placement
from manylora.server.engine.pool import Pool
from manylora.server.engine.residency import ResidencyManager
from manylora.server.engine.types import AdapterKey, Residency, ResidencyState

MODULES = {"first": 0, "second": 1, "third": 2}
WIDTH = 16  # in and out of each module; one rank takes 2 * WIDTH float32 elements a module
SECONDS = 60  # longer than any load of a test takes


def key(digest: str) -> AdapterKey:
    return AdapterKey(digest, f"tenant/{digest}@1")


def lowered(digest: str, rank: int) -> LoweredAdapter:
    """Low-rank edits of the first and the third module, 4 * WIDTH * rank elements in all; every
    number tells the digest."""
    value = float(sum(digest.encode()))
    edits = {
        name: ModuleEdit(
            a=torch.full((rank, WIDTH), value + i), b=torch.full((WIDTH, rank), -value - i)
        )
        for i, name in enumerate(MODULES)
        if name != "second"
    }
    return LoweredAdapter(edits)


def elements(rank: int) -> int:
    return 4 * WIDTH * rank


class Loading:
    """A real ResidencyManager, pool and table. A load waits on its loader thread for `finish`.

    Args:
        ranks: digest → rank, the adapters there are.
        room: what the pool holds, in ranks.
        slots: rows of the edit table.
    """

    def __init__(self, ranks: Mapping[str, int], *, room: int, slots: int) -> None:
        self.ranks = ranks
        self.pool = Pool(elements(room) * 4, torch.float32, torch.device("cpu"))
        self.pool.tensor.fill_(float("nan"))
        self.table = EditTable(slots, len(MODULES))
        self.overrides = Overrides()
        self.events: list[Residency] = []
        self.loading: list[str] = []  # on loader threads, the first begun first
        self._gates: dict[str, SimpleQueue[ManyloraError | None]] = defaultdict(SimpleQueue)
        self._posted: SimpleQueue[Loaded] = SimpleQueue()
        self.placement = Placement(self.pool, self.table, self.overrides)
        self.manager = ResidencyManager(
            self.placement,
            self._load,
            self._posted.put,
            self._notice,
            threads=16,
        )

    def finish(self, digest: str, error: ManyloraError | None = None) -> None:
        """Lets a load end, and hands its result to the manager."""
        self.loading.remove(digest)
        self._gates[digest].put(error)
        message = self._posted.get(timeout=SECONDS)
        assert message.key.digest == digest
        self.manager.loaded(message)

    def finish_all(self) -> None:
        while self.loading:
            self.finish(self.loading[0])

    def make_resident(self, *digests: str) -> None:
        """One after the other, so that the first is the least recently used."""
        for digest in digests:
            self.manager.want([key(digest)])
            self.finish(digest)
            self.manager.want([key(digest)])
            assert self.state(digest) is ResidencyState.RESIDENT, digest
        self.manager.want([])

    def close(self) -> None:
        self.manager.close()
        for digest in self.loading:
            self._gates[digest].put(None)

    def state(self, digest: str) -> ResidencyState | None:
        for residency in self.manager.snapshot():
            if residency.key.digest == digest:
                return residency.state
        return None

    @property
    def resident(self) -> set[str]:
        found = self.manager.snapshot()
        return {r.key.digest for r in found if r.state is ResidencyState.RESIDENT}

    def check_slot(self, digest: str, slot: int) -> None:
        """The table's row and what it points to are the adapter's own, whole."""
        edits = lowered(digest, self.ranks[digest]).edits
        for name, module in MODULES.items():
            rank, offsets = int(self.table.rank[slot, module]), self.table.offsets[slot, module]
            if name not in edits:
                assert rank == 0
                assert (offsets == -1).all()
                continue
            assert rank == self.ranks[digest]
            assert (offsets[2:] == -1).all()
            for offset, wanted in zip(
                offsets[:2].tolist(), (edits[name].a, edits[name].b), strict=True
            ):
                assert wanted is not None
                found = self.pool.tensor[offset : offset + wanted.numel()]
                assert torch.equal(found, wanted.flatten())

    def _load(self, key: AdapterKey) -> PackedAdapter:
        digest = key.digest
        error = self._gates[digest].get(timeout=SECONDS)
        if error is not None:
            raise error
        return pack(lowered(digest, self.ranks[digest]), MODULES, reference, torch.float32)

    def _notice(self, event: Residency) -> None:
        self.events.append(event)
        if event.state is ResidencyState.LOADING:
            self.loading.append(event.key.digest)
