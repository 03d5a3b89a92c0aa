"""Settings that cannot work on this machine are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manylora_testing.engine import Seen

from manylora.errors import FailedPrecondition
from manylora.server.engine.engine import Engine
from manylora.server.engine.settings import EngineSettings


@pytest.mark.parametrize(
    ("gpu", "kernels", "field"), [(False, "auto", "device"), (True, "cpu", "kernels")]
)
def test_misfits_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, kernels: str, field: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    settings = EngineSettings(model=Path("nowhere"), device="cuda", kernels=kernels)
    with pytest.raises(FailedPrecondition) as caught:
        Engine(settings, Path, lambda events: None, Seen())  # noqa: ARG005
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["kv_cache_bytes", "adapter_bytes"])
@pytest.mark.parametrize("size", [1 << 60, 1 << 70])
def test_memory_that_no_machine_has(base: Path, field: str, size: int) -> None:
    sizes = {"kv_cache_bytes": 1 << 20, "adapter_bytes": 1 << 20} | {field: size}
    with pytest.raises(FailedPrecondition, match="cannot be reserved") as caught:
        Engine(EngineSettings(model=base, **sizes), Path, lambda events: None, Seen())  # noqa: ARG005
    assert caught.value.field == field
