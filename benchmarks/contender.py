"""The runner's side of peers/protocol.py: a contender's process, and what it holds in memory."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from peers.protocol import Batch, Outcome, Spec

ANSWER_SECONDS = 600  # more than any contender needs, for a start or a batch
STOP_SECONDS = 20


class ContenderError(Exception):
    """It ended, or did not answer in time."""


@dataclass(slots=True)
class Contender:
    """A running contender. about: what it said when it was ready. start_seconds: until then."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    about: Mapping[str, Any]
    start_seconds: float

    @classmethod
    def start(cls, name: str, command: Sequence[str], spec: Spec) -> Self:
        """command: the interpreter and the script. Its messages go to a file in spec.scratch.

        Raises ContenderError if it does not get ready.
        """
        log = Path(spec.scratch) / f"{name}.log"
        begin = time.perf_counter()
        with log.open("w") as messages:
            process = subprocess.Popen(
                [*command, json.dumps(asdict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )
        contender = cls(name, process, log, {}, 0.0)
        try:
            contender.about = contender._answer()["ready"]
        except BaseException:
            contender.stop()
            raise
        contender.start_seconds = time.perf_counter() - begin
        return contender

    def run(self, batch: Batch) -> Outcome:
        """Raises ContenderError if it ends meanwhile, or takes too long."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{json.dumps(asdict(batch))}\n")
            self.process.stdin.flush()
        except OSError:
            raise self._failed() from None
        return Outcome(**self._answer())

    def stop(self) -> None:
        """Ends it and every process that it has started."""
        family = _family(self.process.pid)
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def peak_bytes(self) -> int:
        """The most that its processes have held, each at its own time."""
        return sum(peak_bytes(member.pid) for member in _family(self.process.pid))

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        watch = threading.Timer(ANSWER_SECONDS, self.process.kill)
        watch.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise self._failed()
        return json.loads(line)

    def _failed(self) -> ContenderError:
        code = self.process.wait()
        last = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        return ContenderError(f"{self.name} ended with {code} ({self.log}): {' / '.join(last)}")


def peak_bytes(process: int) -> int:
    """The kernel's high-water mark of resident memory; 0 if the process has ended."""
    return _status_bytes(process, "VmHWM")


def resident_bytes(process: int) -> int:
    return _status_bytes(process, "VmRSS")


def _status_bytes(process: int, name: str) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _family(process: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        return [parent, *parent.children(recursive=True)]
    return []
