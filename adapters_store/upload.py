"""A checkpoint on its way into the store."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, TypeAlias

from manylora.adapters_store.adapter_version import AdapterVersion
from manylora.adapters_store.files import (
    CHECKPOINT_FILES,
    CONFIG_FILE,
    PICKLED_WEIGHTS,
    WEIGHTS_FILE,
    check_size,
    exists,
    open_file,
    refuse_pickle,
    sync_directory,
)
from manylora.adapters_store.limits import Limits
from manylora.adapters_store.pickles import convert_pickle
from manylora.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

Check: TypeAlias = Callable[[Path], None]
"""A last check of a checkpoint's directory, before it is kept; raises to refuse it."""

_COPY_BYTES = 4 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Publish(Protocol):
    def __call__(
        self, staged: Path, name: str, aliases: Sequence[str], check: Check | None
    ) -> AdapterVersion: ...


class Upload:
    """Takes a checkpoint's files in pieces, then publishes them or leaves nothing behind.

    Files other than the two of a checkpoint are taken and dropped. For one thread at a time; as
    a context manager it aborts unless `commit` succeeded.
    """

    def __init__(
        self, staged: Path, limits: Limits, publish: Publish, destroy: Callable[[Path], None]
    ) -> None:
        self._staged = staged
        self._publish = publish
        self._destroy = destroy
        taken = (*CHECKPOINT_FILES, PICKLED_WEIGHTS) if limits.allow_pickles else CHECKPOINT_FILES
        self._most = {
            name: limits.max_config_bytes if name == CONFIG_FILE else limits.max_weights_bytes
            for name in taken
        }
        self._files: dict[str, BinaryIO] = {}
        self._dropped_bytes = 0
        self._open = True

    def write(self, path: str, data: bytes) -> None:
        """Appends data to the file of that name in the checkpoint.

        Raises InvalidArgument for pickled weights, a path that is not a plain file name, and too
        many bytes; ResourceExhausted when the disk is full.
        """
        self._check_open()
        if path not in self._most:
            self._drop(path, data)
            return
        if path not in self._files:
            self._files[path] = (self._staged / path).open("xb", buffering=0)
        file = self._files[path]
        check_size(file.tell() + len(data), path, self._most[path])
        _write_all(file, data)

    def add_directory(self, directory: int) -> None:
        """Copies a checkpoint's two files from an open directory; others are not looked at.

        Raises InvalidArgument for missing files, links, pickled weights, and too many bytes.
        """
        pickled = PICKLED_WEIGHTS in self._most and not exists(directory, WEIGHTS_FILE)
        for name in (CONFIG_FILE, PICKLED_WEIGHTS if pickled else WEIGHTS_FILE):
            with open_file(directory, name, self._most[name]) as source:
                while data := source.read(_COPY_BYTES):
                    self.write(name, data)

    def commit(
        self, name: str, aliases: Sequence[str] = (), check: Check | None = None
    ) -> AdapterVersion:
        """Checks the files as they now lie in the store, makes them durable and publishes them.

        Raises what the checks raise, and then nothing is kept.
        """
        self._check_open()
        try:
            self._convert_pickle()
            for file in self._files.values():
                os.fchmod(file.fileno(), 0o444)
                os.fsync(file.fileno())
            self._close_files()
            sync_directory(self._staged)
            return self._publish(self._staged, name, aliases, check)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forgets what was uploaded; harmless after `commit` and when repeated."""
        if self._open:
            self._open = False
            self._close_files()
            self._destroy(self._staged)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    def _drop(self, path: str, data: bytes) -> None:
        """Harmless extra files (a README) cost the sender no error and the store no space."""
        if path.lower().endswith(_PICKLE_SUFFIXES):
            raise refuse_pickle(ascii(path))
        if not path or path in (".", "..") or "/" in path or "\\" in path or "\0" in path:
            raise InvalidArgument(
                "not a file of a checkpoint",
                field="path",
                found=ascii(path),
                wanted=" or ".join(CHECKPOINT_FILES),
            )
        self._dropped_bytes += len(data)
        check_size(self._dropped_bytes, ascii(path), self._most[CONFIG_FILE])

    def _convert_pickle(self) -> None:
        """Weights that came as a pickle, and not beside safetensors, become safetensors."""
        pickled = self._files.pop(PICKLED_WEIGHTS, None)
        if pickled is None:
            return
        pickled.close()
        if WEIGHTS_FILE in self._files:
            (self._staged / PICKLED_WEIGHTS).unlink()
            return
        convert_pickle(self._staged, self._most[PICKLED_WEIGHTS])
        self._files[WEIGHTS_FILE] = (self._staged / WEIGHTS_FILE).open("ab", buffering=0)

    def _check_open(self) -> None:
        if not self._open:
            raise FailedPrecondition("this upload is over")

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted("the adapter store's disk is full") from error
        raise
