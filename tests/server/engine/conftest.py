"""What the engine's tests share."""

from __future__ import annotations

from hypothesis import settings

# the same examples in every run, and as long as they take on a loaded machine
settings.register_profile("engine", deadline=None, derandomize=True)
settings.load_profile("engine")
