"""A real `manylora serve`, as a process of its own on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora.errors import Unavailable

_STOP_SECONDS = 20


@contextmanager
def serving(base: Path, store: Path, log: Path) -> Iterator[str]:
    """Serves the base and the store's adapters on any free port; yields "host:port".

    Stopped with SIGTERM at the end. The server's messages go to the file `log`.

    Raises:
        Unavailable: the server ended before it was ready.
    """
    command = [sys.executable, "-m", "manylora.server.cli", "serve"]
    command += ["--model", str(base), "--store", str(store), "--port", "0", "--http-port", "0"]
    with log.open("w") as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        last = log.read_text().strip().splitlines()[-1:]
        raise Unavailable("the server did not start", field=str(log), found=" ".join(last))
    return str(json.loads(line)["grpc"])
