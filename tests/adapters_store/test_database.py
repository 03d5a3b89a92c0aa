"""A transaction that fails, wherever it does, is undone, and the next one is none the worse."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from manylora.adapters_store.adapter_version import AdapterVersion
from manylora.adapters_store.database import Database
from manylora.adapters_store.names import AdapterName, AdapterRef
from manylora.errors import ResourceExhausted

NAME = AdapterName("acme", "tickets")


def version(number: int, peft_type: str = "LORA") -> AdapterVersion:
    return AdapterVersion(
        NAME.tenant, NAME.adapter, number, "ab" * 32, 1, datetime.now(UTC), peft_type, 8
    )


def check_works(database: Database) -> None:
    with database.write() as rows:
        rows.add(version(1))
    with database.read() as rows:
        assert [found.version for found in rows.versions(NAME)] == [1]


def test_a_commit_that_fails(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "store.db")) as database:
        with pytest.raises(sqlite3.IntegrityError), database.write() as rows:
            rows._connection.execute("PRAGMA defer_foreign_keys = ON")
            rows.set_alias(version(7), "prod")  # of no version, which the commit finds
        check_works(database)
        with database.read() as rows:
            assert rows.find(AdapterRef(NAME, alias="prod")) is None


def test_a_full_disk(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "store.db")) as database:
        (pages,) = database._writer.execute("PRAGMA page_count").fetchone()
        database._writer.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(ResourceExhausted, match="disk is full"), database.write() as rows:
            rows.add(version(2, peft_type="x" * 100_000))
        check_works(database)
