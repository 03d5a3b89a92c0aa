"""The store's files: whole checkpoints, each in a directory named by its digest.

`objects/ab/abcd…/` holds the two files of one checkpoint and never changes. It appears by one
rename of a directory whose bytes are on disk already, and disappears by one rename; what lies in
`staging/` is nobody's.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import threading
from collections.abc import Collection
from pathlib import Path

from manylora.adapters_store.files import (
    CHECKPOINT_FILES,
    open_directory,
    open_file,
    sync_directory,
)
from manylora.errors import DataLoss, InvalidArgument, ManyloraError, NotFound

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ANY_SIZE = 1 << 62

_Stamp = tuple[tuple[int, ...], ...]  # of each file: inode, size, times of the last changes


def digest_of(directory: Path) -> str:
    """A checkpoint's digest: what `sha256sum adapter_config.json adapter_model.safetensors |
    sha256sum` prints in its directory. Raises InvalidArgument where a file is missing."""
    lines = []
    with open_directory(directory) as descriptor:
        for name in CHECKPOINT_FILES:
            with open_file(descriptor, name, _ANY_SIZE) as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stamp_of(directory: Path) -> _Stamp:
    found = [(directory / name).lstat() for name in CHECKPOINT_FILES]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


class Objects:
    """The directory of checkpoints. Thread-safe; `keep` and `detach` of one digest must not run
    at the same time in any process, which the store ensures by its database's write lock."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._staging = root / "staging"
        self._objects.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(exist_ok=True, mode=0o700)
        self._verified: dict[str, _Stamp] = {}
        self._lock = threading.Lock()

    def new_staging(self) -> Path:
        """A new, empty directory for a checkpoint to be."""
        path = self._staging / secrets.token_hex(16)
        path.mkdir()
        return path

    def keep(self, staged: Path, digest: str) -> Path | None:
        """Makes a staged checkpoint, whose bytes are synced, the object of its digest.

        An object that is there already stays if it is whole. Returns a directory to destroy: the
        staged one where it was not needed, or a damaged object that it replaced.
        """
        target = self._path(digest)
        damaged = None
        if target.exists():
            if self._is_whole(digest):
                return staged
            damaged = self.detach(digest)
        self._make_parent(target)
        staged.rename(target)
        sync_directory(target.parent)
        with self._lock:
            self._verified[digest] = _stamp_of(target)
        return damaged

    def open(self, digest: str) -> Path:
        """The object's directory; its digest is checked on first use, and again when its files
        look changed.

        Raises NotFound where there is none, DataLoss where the bytes have changed.
        """
        if not _DIGEST.fullmatch(digest):
            raise InvalidArgument("not a digest", field="digest", found=ascii(digest))
        path = self._path(digest)
        if self._is_whole(digest):
            return path
        if not path.exists():
            raise NotFound("no such object in the store", field="digest", found=digest)
        raise DataLoss("stored bytes do not match their digest", field="digest", found=digest)

    def detach(self, digest: str) -> Path:
        """Takes an object out, at once and whole; returns the directory to destroy, which does
        not exist if the object did not."""
        with self._lock:
            self._verified.pop(digest, None)
        trash = self._staging / secrets.token_hex(16)
        with contextlib.suppress(FileNotFoundError):
            self._path(digest).rename(trash)
        return trash

    def destroy(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)

    def recover(self, referenced: Collection[str]) -> None:
        """Removes what a crash left: all that is staged, and objects that nobody refers to.

        Only for a process that has the store to itself.
        """
        for staged in self._staging.iterdir():
            self.destroy(staged)
        for path in self._objects.glob("*/*"):
            if path.name not in referenced:
                self.destroy(self.detach(path.name))

    def _is_whole(self, digest: str) -> bool:
        path = self._path(digest)
        try:
            stamp = _stamp_of(path)
            with self._lock:
                if self._verified.get(digest) == stamp:
                    return True
            whole = digest_of(path) == digest
        except (ManyloraError, OSError):
            return False
        if whole:
            with self._lock:
                self._verified[digest] = stamp
        return whole

    def _make_parent(self, target: Path) -> None:
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            sync_directory(self._objects)

    def _path(self, digest: str) -> Path:
        return self._objects / digest[:2] / digest
