"""What the store knows about one version of one adapter."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from manylora.adapters_store.names import AdapterName


@dataclass(slots=True, frozen=True)
class AdapterVersion:
    """One immutable version; only `aliases` may differ when it is read again."""

    tenant: str
    adapter: str
    version: int
    digest: str  # of both files, see objects.digest_of
    size_bytes: int
    created: datetime  # UTC
    peft_type: str
    rank: int  # the largest of its modules'
    aliases: tuple[str, ...] = ()  # in alphabetical order; without `latest`

    @property
    def name(self) -> AdapterName:
        return AdapterName(self.tenant, self.adapter)

    @property
    def label(self) -> str:
        """`tenant/adapter@version`."""
        return f"{self.tenant}/{self.adapter}@{self.version}"
