"""The adapter store: names, immutable numbered versions, movable aliases, and the checkpoints.

A directory that processes may share:

    store.db     rows (SQLite)
    objects/     checkpoints by digest
    staging/     uploads under way, and what waits to be deleted
    in-use.lock  held shared by every open store, so that only a process that is alone clears up
    opening.lock held while a store opens

A crash at any moment leaves either the version whole or no trace that anybody can see; what lies
about on disk is removed when a process next has the store to itself.
"""

from __future__ import annotations

import base64
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from manylora.adapters_store import lowering
from manylora.adapters_store.adapter_version import AdapterVersion
from manylora.adapters_store.database import Database
from manylora.adapters_store.files import CHECKPOINT_FILES, open_directory
from manylora.adapters_store.format import read_checkpoint
from manylora.adapters_store.limits import DEFAULT_LIMITS, Limits
from manylora.adapters_store.names import AdapterName, AdapterRef, check_alias, check_name
from manylora.adapters_store.objects import Objects, digest_of
from manylora.adapters_store.sources import open_below
from manylora.adapters_store.upload import Check, Upload
from manylora.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound

_DEFAULT_PAGE = 100
_MOST_PAGE = 1000


@dataclass(slots=True, frozen=True)
class Page:
    """Some adapters, each by its newest version; next_page_token is "" on the last page."""

    versions: tuple[AdapterVersion, ...]
    next_page_token: str


class Store:
    """Thread-safe; several processes may open the same root."""

    def __init__(self, root: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        """Raises FailedPrecondition where the root cannot be made or written."""
        self.limits = limits
        try:
            self._open(root)
        except OSError as error:
            raise FailedPrecondition(
                f"cannot open the adapter store: {error.strerror}", field="store", found=root
            ) from error

    def _open(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "opening.lock"):
            self._in_use = (root / "in-use.lock").open("w")
            alone = _try_lock(self._in_use)
            self._objects = Objects(root)
            self._database = Database(root / "store.db")
            if alone:
                with self._database.read() as rows:
                    referenced = rows.digests()
                self._objects.recover(referenced)
            fcntl.flock(self._in_use, fcntl.LOCK_SH)

    def close(self) -> None:
        self._database.close()
        self._in_use.close()

    def publish(
        self, name: str, directory: Path, aliases: Sequence[str] = (), check: Check | None = None
    ) -> AdapterVersion:
        """Publishes the checkpoint in a directory that the caller trusts; see Upload.commit."""
        with open_directory(directory) as descriptor, self.begin_upload() as upload:
            upload.add_directory(descriptor)
            return upload.commit(name, aliases, check)

    def publish_below(
        self,
        name: str,
        path: str,
        roots: Sequence[Path],
        aliases: Sequence[str] = (),
        check: Check | None = None,
    ) -> AdapterVersion:
        """Publishes the checkpoint at a path that a stranger named; see sources.open_below."""
        with open_below(path, roots) as descriptor, self.begin_upload() as upload:
            upload.add_directory(descriptor)
            return upload.commit(name, aliases, check)

    def begin_upload(self) -> Upload:
        return Upload(
            self._objects.new_staging(), self.limits, self._publish_staged, self._objects.destroy
        )

    def resolve(self, ref: str, field: str = "adapter") -> AdapterVersion:
        """`tenant/adapter`, `tenant/adapter@3`, `tenant/adapter:prod` → the version.

        field: what the caller's request calls the ref. Raises InvalidArgument for a malformed
        ref, NotFound.
        """
        parsed = AdapterRef.parse(ref, field)
        with self._database.read() as rows:
            version = rows.find(parsed)
            if version is not None:
                return version
            known = rows.find(AdapterRef(parsed.name)) is not None
        what = "no such version or alias of this adapter" if known else "no such adapter"
        raise NotFound(what, field=field, found=ref)

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """All versions, oldest first. Raises NotFound."""
        parsed = AdapterName.parse(name)
        with self._database.read() as rows:
            versions = rows.versions(parsed)
        if not versions:
            raise NotFound("no such adapter", field="name", found=name)
        return tuple(versions)

    def list(self, tenant: str | None = None, page_size: int = 0, page_token: str = "") -> Page:
        """Adapters in the order of their names, of one tenant or of all.

        page_size: 0 for the default of 100; more than 1000 is cut to that. page_token: "" or what
        the page before returned, with the same tenant; a name that appears or goes between two
        pages shifts no other. Raises InvalidArgument.
        """
        if tenant is not None:
            check_name(tenant, "tenant")
        if page_size < 0:
            raise InvalidArgument(
                "negative", field="page_size", found=page_size, wanted="0 or more"
            )
        size = min(page_size or _DEFAULT_PAGE, _MOST_PAGE)
        after = _read_token(page_token, tenant) if page_token else None
        with self._database.read() as rows:
            found = rows.newest_after(after, tenant, size + 1)
        token = _make_token(found[size - 1].name, tenant) if len(found) > size else ""
        return Page(tuple(found[:size]), token)

    def set_alias(self, ref: str, alias: str) -> AdapterVersion:
        """Makes the alias stand for the version that ref means now. Raises InvalidArgument,
        NotFound."""
        check_alias(alias)
        parsed = AdapterRef.parse(ref)
        with self._database.write() as rows:
            version = rows.find(parsed)
            if version is None:
                raise NotFound("no such adapter or version", field="adapter", found=ref)
            rows.set_alias(version, alias)
            return rows.find(parsed) or version

    def delete(self, ref: str, field: str = "adapter") -> tuple[AdapterVersion, ...]:
        """Deletes one version (`tenant/adapter@3`), or an adapter with all versions and aliases.

        field: as for resolve. Returns what was deleted. The numbers are not used again. Raises
        NotFound; FailedPrecondition for a version that has an alias; InvalidArgument for a ref by
        alias.
        """
        parsed = AdapterRef.parse(ref, field)
        if parsed.alias is not None or ":" in ref:
            raise InvalidArgument(
                "cannot delete by alias", field=field, found=ref, wanted="a name or a version"
            )
        with self._database.write() as rows:
            if parsed.version is None:
                deleted = tuple(rows.versions(parsed.name))
                rows.delete(parsed.name)
            else:
                version = rows.find(parsed)
                deleted = (version,) if version else ()
                for version in deleted:
                    _refuse_if_aliased(version, field)
                    rows.delete_version(version)
        if not deleted:
            raise NotFound("no such adapter or version", field=field, found=ref)
        for digest in {version.digest for version in deleted}:
            self._collect(digest)
        return deleted

    def open_object(self, digest: str) -> Path:
        """The directory with the checkpoint's two files, checked against the digest on first use
        and when they look changed.

        Raises NotFound for a digest of no version, DataLoss where the bytes are gone or changed.
        """
        try:
            return self._objects.open(digest)
        except NotFound:
            with self._database.read() as rows:
                if rows.refers_to(digest):
                    raise DataLoss("stored bytes are gone", field="digest", found=digest) from None
            raise

    def _publish_staged(
        self, staged: Path, name: str, aliases: Sequence[str], check: Check | None
    ) -> AdapterVersion:
        parsed = AdapterName.parse(name)
        for alias in aliases:
            check_alias(alias, "aliases")
        checkpoint = read_checkpoint(staged, self.limits)
        rank = lowering.check_config(checkpoint, self.limits)
        if check is not None:
            check(staged)
        digest = digest_of(staged)
        size = sum((staged / file).stat().st_size for file in CHECKPOINT_FILES)
        with self._database.write() as rows:
            trash = self._objects.keep(staged, digest)
            version = rows.find(AdapterRef(parsed))
            if version is None or version.digest != digest:
                version = AdapterVersion(
                    tenant=parsed.tenant,
                    adapter=parsed.adapter,
                    version=rows.next_version(parsed),
                    digest=digest,
                    size_bytes=size,
                    created=datetime.now(UTC),
                    peft_type=lowering.peft_type(checkpoint),
                    rank=rank,
                )
                rows.add(version)
            for alias in aliases:
                rows.set_alias(version, alias)
            published = rows.find(AdapterRef(parsed, version=version.version))
        if trash is not None:
            self._objects.destroy(trash)
        return published or version

    def _collect(self, digest: str) -> None:
        """Removes an object once no version refers to it; the rows are gone for good by now."""
        with self._database.write() as rows:
            if rows.refers_to(digest):
                return
            trash = self._objects.detach(digest)
        self._objects.destroy(trash)


def _refuse_if_aliased(version: AdapterVersion, field: str) -> None:
    if version.aliases:
        raise FailedPrecondition(
            "the version has aliases; move them first",
            field=field,
            found=f"{version.label} is {', '.join(version.aliases)}",
        )


def _make_token(last: AdapterName, tenant: str | None) -> str:
    content = json.dumps([last.tenant, last.adapter, tenant])
    return base64.urlsafe_b64encode(content.encode()).decode()


def _read_token(token: str, tenant: str | None) -> AdapterName:
    """The name that the page before ended with."""
    try:
        content = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        last_tenant, last_adapter, token_tenant = content
        last = AdapterName.parse(f"{last_tenant}/{last_adapter}")
        if token_tenant != tenant:
            raise ValueError("another tenant's list")
    except (ValueError, TypeError, RecursionError, InvalidArgument):
        raise InvalidArgument(
            "not a token of this list",
            field="page_token",
            found=ascii(token),
            wanted="the next_page_token of the page before, with the same tenant",
        ) from None
    return last


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
