"""An adapter's checkpoint → what is copied to the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from manylora.adapters_store.edits import LoweredAdapter
from manylora.adapters_store.format import open_checkpoint
from manylora.adapters_store.lowering.compose import Part, compose
from manylora.errors import ManyloraError, NotFound
from manylora.kernels import Backend
from manylora.server.engine.model import AdaptedModel, EncoderModel
from manylora.server.engine.packing import PackedAdapter, pack
from manylora.server.engine.prefix import check_prefix
from manylora.server.engine.types import AdapterKey


class AdapterLoader:
    """Reads, lowers and packs; any thread.

    Args:
        model: the base.
        kernels: whose layout the low-rank factors get.
        fetch: digest → directory of the adapter's checkpoint.
        max_context: tokens of a sequence, the adapter's own among them.
    """

    def __init__(
        self,
        model: AdaptedModel | EncoderModel,
        kernels: Backend,
        fetch: Callable[[str], Path],
        max_context: int,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._fetch = fetch
        self._max_context = max_context
        self._module_ids = {name: i for i, name in enumerate(model.modules)}

    def load(self, key: AdapterKey) -> PackedAdapter:
        """Raises NotFound, DataLoss, or what `lower_and_pack` raises."""
        if not key.parts:
            return self._pack(self._fetch_lowered(key.digest, key.label))
        return self._pack(
            compose(
                [Part(p.label, p.weight, self._fetch_lowered(p.digest, p.label)) for p in key.parts]
            )
        )

    def lower_and_pack(self, path: Path) -> PackedAdapter:
        """Raises InvalidArgument or FailedPrecondition if the checkpoint is broken, not served or
        does not fit the base."""
        return self._pack(self._model.lower(open_checkpoint(path)))

    def _fetch_lowered(self, digest: str, label: str) -> LoweredAdapter:
        deleted = NotFound("deleted meanwhile", field="adapter", found=label)
        try:
            path = self._fetch(digest)
        except NotFound:
            raise deleted from None
        try:
            return self._model.lower(open_checkpoint(path))
        except ManyloraError:
            if path.exists():
                raise
            raise deleted from None

    def _pack(self, lowered: LoweredAdapter) -> PackedAdapter:
        check_prefix(lowered, self._model, self._max_context)
        return pack(lowered, self._module_ids, self._kernels, self._model.dtype)
