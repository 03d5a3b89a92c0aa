"""Opening files that strangers wrote: regular files only, no links, sizes bounded."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from manylora.errors import InvalidArgument

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE)

PICKLED_WEIGHTS = "adapter_model.bin"
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """A descriptor of a directory that the caller trusts. Raises InvalidArgument."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            "cannot open the checkpoint's directory", field=str(path), found=_reason(error)
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(directory: int, name: str, max_bytes: int) -> FileIO:
    """Opens one of the checkpoint's files in an open directory.

    Raises InvalidArgument for a missing file, a link, anything but a regular file, and a file of
    more than max_bytes.
    """
    try:
        descriptor = os.open(name, _OPEN_FILE, dir_fd=directory)
    except OSError as error:
        raise _cannot_open(directory, name, error) from None
    try:
        check_file(os.fstat(descriptor), name, max_bytes)
        return FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_file(status: os.stat_result, name: str, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument("not a regular file", field=name)
    check_size(status.st_size, name, max_bytes)


def check_size(size: int, name: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise InvalidArgument(
            "file is too large",
            field=name,
            found=f"{size} bytes",
            wanted=f"at most {max_bytes} bytes",
        )


def refuse_pickle(name: str) -> InvalidArgument:
    """The error for weights that come as a pickle."""
    return InvalidArgument(
        "pickled weights are not read, since reading them can run code",
        field=name,
        wanted=f"{WEIGHTS_FILE} (peft: save_pretrained(..., safe_serialization=True)), or a server "
        f"with allow_pickles, which converts {PICKLED_WEIGHTS}",
    )


def sync_directory(path: Path) -> None:
    """Makes the directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(directory: int, name: str) -> bool:
    """Whether an open directory has an entry of that name; a link counts as one."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _cannot_open(directory: int, name: str, error: OSError) -> InvalidArgument:
    if error.errno == errno.ELOOP:
        return InvalidArgument("links are not followed", field=name, wanted="a regular file")
    if error.errno != errno.ENOENT:
        return InvalidArgument("cannot open the file", field=name, found=_reason(error))
    if name == WEIGHTS_FILE and exists(directory, PICKLED_WEIGHTS):
        return refuse_pickle(PICKLED_WEIGHTS)
    return InvalidArgument(
        "the checkpoint lacks this file", field=name, wanted=" and ".join(CHECKPOINT_FILES)
    )


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
