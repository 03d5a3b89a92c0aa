"""Where adapters come from: a directory on the server's own disks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from manylora.errors import InvalidArgument, NotFound, PermissionDenied

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FIELD = "path"


@contextmanager
def open_below(path: str, roots: Sequence[Path]) -> Iterator[int]:
    """A descriptor of the directory that a stranger named, below one of the operator's roots.

    path: absolute. It is walked down from the root one name at a time and no link is followed, so
    it cannot lead out, even if the tree changes meanwhile. Raises InvalidArgument for a malformed
    path and one through a link, PermissionDenied outside the roots, NotFound where nothing is.
    """
    root, parts = _split(path, roots)
    try:
        descriptor = os.open(root, _OPEN_DIRECTORY)
    except OSError as error:
        raise NotFound(
            f"cannot open the directory to import from: {error.strerror}", field=_FIELD, found=root
        ) from None
    try:
        for part in parts:
            below = _open_part(descriptor, part, path)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _split(path: str, roots: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    if "\0" in path or len(path) > 4096:
        raise InvalidArgument("not a path", field=_FIELD, found=ascii(path))
    pure = PurePosixPath(path)
    if not pure.is_absolute() or ".." in pure.parts:
        raise InvalidArgument(
            "not an absolute path without '..'", field=_FIELD, found=ascii(path), wanted="/a/path"
        )
    for root in roots:
        for form in (root, root.resolve()):
            if pure.is_relative_to(form):
                return form, pure.relative_to(form).parts
    raise PermissionDenied(
        "the path is outside the directories that this server imports from",
        field=_FIELD,
        found=ascii(path),
        wanted=f"a path below one of: {', '.join(map(str, roots)) or 'none, imports are off'}",
    )


def _open_part(directory: int, part: str, path: str) -> int:
    try:
        return os.open(part, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        raise NotFound("no such directory", field=_FIELD, found=ascii(path)) from None
    except PermissionError:
        raise PermissionDenied(
            "the server may not read this", field=_FIELD, found=ascii(path)
        ) from None
    except (OSError, ValueError):  # a file, a link, a name that is too long or no text
        raise InvalidArgument(
            "links are not followed, and files are not directories",
            field=_FIELD,
            found=f"{part!a} in {path!a}",
            wanted="a directory",
        ) from None
