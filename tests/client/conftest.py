"""A real server with a tiny model."""

from __future__ import annotations

from manylora_testing.served_fixtures import (
    adapter_dirs,
    base_model,
    server,
    settings,
    tenant,
)

__all__ = ["adapter_dirs", "base_model", "server", "settings", "tenant"]
