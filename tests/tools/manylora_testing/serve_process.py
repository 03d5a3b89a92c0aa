"""`manylora serve` as a process of its own, on free ports of the loopback address."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

STOP_SECONDS = 60


@dataclass
class ServeProcess:
    """A running server; as a context manager, killed at the end if it still runs."""

    process: subprocess.Popen[str]
    log: Path
    grpc: str  # "127.0.0.1:port"
    http_port: int

    @classmethod
    def start(cls, directory: Path, model: Path, flags: Sequence[str] = ()) -> ServeProcess:
        """Starts it and waits for its ready line; `directory` gets its store and its log."""
        log = directory / "serve.log"
        command = [sys.executable, "-m", "manylora.server.cli", "serve", "--model", str(model)]
        command += ["--port", "0", "--http-port", "0", "--store", str(directory / "store"), *flags]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, cwd=directory, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait()
            raise AssertionError(f"the server did not start:\n{log.read_text()}")
        ready = json.loads(line)
        return cls(process, log, ready["grpc"], int(ready["http"].rpartition(":")[2]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an HTTP request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(STOP_SECONDS)
