"""The store's rows: versions, aliases, and the last number that each name has given away."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from manylora.adapters_store.adapter_version import AdapterVersion
from manylora.adapters_store.names import AdapterName, AdapterRef
from manylora.errors import FailedPrecondition, ResourceExhausted, Unavailable

_FORMAT = 1
_BUSY_SECONDS = 60.0

_SCHEMA = f"""
CREATE TABLE names (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, last_version INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter)
) WITHOUT ROWID;
CREATE TABLE versions (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, version INTEGER NOT NULL,
    digest TEXT NOT NULL, size_bytes INTEGER NOT NULL, created REAL NOT NULL,
    peft_type TEXT NOT NULL, rank INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter, version)
) WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);
CREATE TABLE aliases (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (tenant, adapter, alias),
    FOREIGN KEY (tenant, adapter, version) REFERENCES versions
) WITHOUT ROWID;
PRAGMA user_version = {_FORMAT};
"""

_SELECT = """
SELECT tenant, adapter, version, digest, size_bytes, created, peft_type, rank,
    (SELECT group_concat(alias, ' ') FROM aliases a
     WHERE a.tenant = v.tenant AND a.adapter = v.adapter AND a.version = v.version)
FROM versions v
"""
_IS_NEWEST = """version = (SELECT max(version) FROM versions w
    WHERE w.tenant = v.tenant AND w.adapter = v.adapter)"""


class Database:
    """One SQLite file in WAL mode, synced at every commit. Thread-safe: readers share one
    connection and writers another, so that nobody who reads waits for a writer's disk."""

    def __init__(self, path: Path) -> None:
        self._writer, self._reader = _connect(path), _connect(path)
        self._writer_lock, self._reader_lock = threading.Lock(), threading.Lock()
        with self._writer_lock:
            _prepare(self._writer, path)

    @contextmanager
    def read(self) -> Iterator[Rows]:
        with self._reader_lock:
            self._reader.execute("BEGIN")
            try:
                yield Rows(self._reader)
            finally:
                self._reader.execute("COMMIT")

    @contextmanager
    def write(self) -> Iterator[Rows]:
        """One transaction that no other writer, in any process, overlaps.

        Raises Unavailable if another one holds on for a minute, ResourceExhausted when the disk
        is full.
        """
        with self._writer_lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise Unavailable(f"the adapter store is busy: {error}") from error
            try:
                yield Rows(self._writer)
                self._writer.execute("COMMIT")
            except BaseException as error:
                if self._writer.in_transaction:  # some errors end it by themselves
                    self._writer.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                    raise ResourceExhausted("the adapter store's disk is full") from error
                raise

    def close(self) -> None:
        with self._writer_lock, self._reader_lock:
            self._reader.close()
            self._writer.close()


class Rows:
    """Reading and writing rows within one transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def find(self, ref: AdapterRef) -> AdapterVersion | None:
        key = (ref.name.tenant, ref.name.adapter)
        where = f"{_SELECT} WHERE tenant = ? AND adapter = ?"
        if ref.version is not None:
            return self._first(f"{where} AND version = ?", *key, ref.version)
        if ref.alias is not None:
            of_alias = (
                "(SELECT version FROM aliases WHERE tenant = ? AND adapter = ? AND alias = ?)"
            )
            return self._first(f"{where} AND version = {of_alias}", *key, *key, ref.alias)
        return self._first(f"{where} ORDER BY version DESC LIMIT 1", *key)

    def versions(self, name: AdapterName) -> list[AdapterVersion]:
        """Oldest first."""
        where = "WHERE tenant = ? AND adapter = ? ORDER BY version"
        return self._all(f"{_SELECT} {where}", name.tenant, name.adapter)

    def newest_after(
        self, after: AdapterName | None, tenant: str | None, limit: int
    ) -> list[AdapterVersion]:
        """The newest version of each name after `after`, in the names' order."""
        start = after or AdapterName("", "")
        where, values = "(tenant, adapter) > (?, ?)", [start.tenant, start.adapter]
        if tenant is not None:
            where, values = f"{where} AND tenant = ?", [*values, tenant]
        query = f"{_SELECT} WHERE {where} AND {_IS_NEWEST} ORDER BY tenant, adapter LIMIT ?"
        return self._all(query, *values, limit)

    def next_version(self, name: AdapterName) -> int:
        """Gives away the next number, which is never given again, even after a delete."""
        row = self._connection.execute(
            "INSERT INTO names VALUES (?, ?, 1) "
            "ON CONFLICT DO UPDATE SET last_version = last_version + 1 RETURNING last_version",
            (name.tenant, name.adapter),
        ).fetchone()
        return int(row[0])

    def add(self, version: AdapterVersion) -> None:
        self._connection.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                version.tenant,
                version.adapter,
                version.version,
                version.digest,
                version.size_bytes,
                version.created.timestamp(),
                version.peft_type,
                version.rank,
            ),
        )

    def set_alias(self, version: AdapterVersion, alias: str) -> None:
        self._connection.execute(
            "INSERT INTO aliases VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET version = excluded.version",
            (version.tenant, version.adapter, alias, version.version),
        )

    def delete(self, name: AdapterName) -> None:
        for table in ("aliases", "versions"):
            self._connection.execute(
                f"DELETE FROM {table} WHERE tenant = ? AND adapter = ?", (name.tenant, name.adapter)
            )

    def delete_version(self, version: AdapterVersion) -> None:
        """The version must have no alias."""
        self._connection.execute(
            "DELETE FROM versions WHERE tenant = ? AND adapter = ? AND version = ?",
            (version.tenant, version.adapter, version.version),
        )

    def refers_to(self, digest: str) -> bool:
        row = self._connection.execute(
            "SELECT EXISTS (SELECT 1 FROM versions WHERE digest = ?)", (digest,)
        ).fetchone()
        return bool(row[0])

    def digests(self) -> set[str]:
        return {row[0] for row in self._connection.execute("SELECT DISTINCT digest FROM versions")}

    def _all(self, query: str, *values: str | int) -> list[AdapterVersion]:
        return [_version(row) for row in self._connection.execute(query, values)]

    def _first(self, query: str, *values: str | int) -> AdapterVersion | None:
        rows = self._all(query, *values)
        return rows[0] if rows else None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    with closing(connection.execute("PRAGMA user_version")) as cursor:
        found = cursor.fetchone()[0]
    if found == 0:
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
    elif found != _FORMAT:
        raise FailedPrecondition(
            "the adapter store was written by another version of manylora",
            field=str(path),
            found=f"format {found}",
            wanted=f"format {_FORMAT}",
        )


def _version(row: tuple[str, str, int, str, int, float, str, int, str | None]) -> AdapterVersion:
    tenant, adapter, version, digest, size, created, peft_type, rank, aliases = row
    return AdapterVersion(
        tenant=tenant,
        adapter=adapter,
        version=version,
        digest=digest,
        size_bytes=size,
        created=datetime.fromtimestamp(created, UTC),
        peft_type=peft_type,
        rank=rank,
        aliases=tuple(sorted(aliases.split())) if aliases else (),
    )
