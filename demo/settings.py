"""What `manylora demo` can be told. A field's help is its annotation, as in TrainSettings."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated


def default_cache() -> Path:
    """$MANYLORA_CACHE, else the user's cache directory (XDG base directory specification)."""
    if own := os.environ.get("MANYLORA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manylora"


@dataclass(slots=True, frozen=True, kw_only=True)
class DemoSettings:
    base: Annotated[
        Path | None, "Base model's directory; default: SmolLM2-135M-Instruct, fetched once."
    ] = None
    cache: Annotated[Path, "Where the base and the trained adapters are kept."] = field(
        default_factory=default_cache
    )
