"""README's examples do what it says, word for word but for the addresses, on a tiny base."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from manylora_testing.adapters import tiny_lora
from manylora_testing.models import tiny_model
from manylora_testing.serve_process import ServeProcess
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora.adapters_store.lowering import FAMILIES

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
ADDRESS = "localhost:50051"
BASE = "models/SmolLM2-135M-Instruct"
ROWS = [{"prompt": f"Printer {i} is on fire.", "completion": " urgent"} for i in range(8)]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _commands() -> list[list[str]]:
    """The console examples' arguments, without the leading `manylora`."""
    lines = [line for block in _blocks("console") for line in block.splitlines()]
    words = [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]
    assert all(program == "manylora" for program, *_ in words)
    return [arguments for _, *arguments in words]


def _make_world(directory: Path) -> None:
    """The files that the examples name."""
    base = directory / BASE
    tiny_model("llama", base, vocab_size=TOKENIZER_VOCAB, max_position_embeddings=512)
    tiny_tokenizer(base)
    tiny_lora(base, directory / "my-adapter", r=4, alpha=8.0, targets="all-linear", seed=1)
    (directory / "tickets.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))


def test_every_served_method_is_named() -> None:
    words = re.sub(r"[^a-z0-9 ]", "", README.lower().replace("³", "3")).split()
    assert {family.lower().replace("_", "") for family in FAMILIES} <= set(words)


def test_examples(tmp_path: Path) -> None:
    _make_world(tmp_path)
    (serve, *serve_flags), *others = _commands()
    (program,) = _blocks("python")
    assert serve == "serve"
    assert program.count(ADDRESS) == 1

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "MANYLORA_SERVER": server.grpc},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    with ServeProcess.start(tmp_path, tmp_path / BASE, serve_flags) as server:
        printed = {
            command[0]: run("-m", "manylora.server.cli", *command)
            for command in others
            if command[0] != "train"
        }
        answer = run("-c", program.replace(ADDRESS, server.grpc))
        (train,) = (command for command in others if command[0] == "train")
        trained = run("-m", "manylora.server.cli", *train)

    assert printed["adapters"] == "acme/support@1\n"
    assert printed["generate"].strip()
    assert answer.strip()
    assert trained == "acme/support@2\n", "into the store that the server has open"
