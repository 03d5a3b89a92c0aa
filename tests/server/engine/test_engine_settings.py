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
    settings = EngineSettings(model=Path("nowhere"), device="cuda", kernels=kernels)
    with pytest.raises(FailedPrecondition) as caught:
        Engine(settings, Path, lambda events: None, Seen())  # noqa: ARG005
    assert caught.value.field == field
