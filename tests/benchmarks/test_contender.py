"""The protocol, with a contender that is a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from contender import Contender, ContenderError
from paths import HERE
from peers.protocol import Batch, Spec

ECHO = f"""
import sys
sys.path.insert(0, {str(HERE / "peers")!r})
from protocol import Outcome, serve

def start(spec):
    print("a library that prints")
    def run(batch):
        if batch.output_tokens == 0:
            raise ValueError("no tokens")
        print("more of it")
        return Outcome(1.5, batch.output_tokens * len(batch.prompts), first=[0.5])
    return run, {{"adapters": spec.adapters}}

serve(start)
"""


def _start(directory: Path, script: str) -> Contender:
    (directory / "script.py").write_text(script)
    command = [sys.executable, str(directory / "script.py")]
    return Contender.start("echo", command, Spec("model", str(directory), ["a", "b"]))


def test_answers_batch_by_batch(tmp_path: Path) -> None:
    contender = _start(tmp_path, ECHO)
    try:
        assert contender.about == {"adapters": ["a", "b"]}
        assert contender.start_seconds > 0
        for tokens in (3, 4):
            outcome = contender.run(Batch([[1], [2]], [-1, 0], tokens))
            assert (outcome.tokens, outcome.first, outcome.last) == (2 * tokens, [0.5], None)
        assert contender.peak_bytes() > 1 << 20
    finally:
        contender.stop()
    assert contender.process.returncode == 0
    assert contender.peak_bytes() == 0
    assert "more of it" in contender.log.read_text()


def test_a_contender_that_fails_says_why(tmp_path: Path) -> None:
    contender = _start(tmp_path, ECHO)
    try:
        with pytest.raises(ContenderError, match="ValueError: no tokens"):
            contender.run(Batch([[1]], [-1], 0))
        with pytest.raises(ContenderError):
            contender.run(Batch([[1]], [-1], 1))
    finally:
        contender.stop()


def test_a_contender_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ContenderError, match="ended with 3"):
        _start(tmp_path, "raise SystemExit(3)")
