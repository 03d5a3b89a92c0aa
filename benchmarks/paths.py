"""Where the benchmark keeps what it makes: adapters, peers' virtual environments, results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manylora.demo.settings import default_cache

HERE = Path(__file__).resolve().parent


@dataclass(slots=True, frozen=True)
class Places:
    """cache: the demo's; the base model is its too."""

    cache: Path

    @classmethod
    def default(cls) -> Places:
        return cls(default_cache())

    @property
    def adapters(self) -> Path:
        return self.cache / "bench" / "adapters"

    @property
    def peers(self) -> Path:
        return self.cache / "bench" / "peers"

    def scratch(self, contender: str) -> Path:
        """A directory of the contender's own, made."""
        directory = self.cache / "bench" / "scratch" / contender
        directory.mkdir(parents=True, exist_ok=True)
        return directory
