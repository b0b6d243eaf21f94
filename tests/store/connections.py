"""What connections do and hold, seen from outside."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from typing import Any

from peewee import Database

from tests.databases import Place, execute


def open_handles(db: Database) -> int:
    """How often this process has the file of the database open."""
    file, handles = os.stat(db.database), 0
    for number in os.listdir("/dev/fd"):
        with suppress(OSError):
            handles += os.path.samestat(os.fstat(int(number)), file)
    return handles


def in_use(db: Database) -> int:
    """How many connections are in use; those that are idle are closed."""
    db.close_idle()  # type: ignore[attr-defined]
    return open_handles(db)


def count(db: Database) -> int:
    """How many webhooks are there?"""
    return int(db.execute_sql("SELECT count(*) FROM webhooks").fetchone()[0])


def end_connections(place: Place) -> None:
    """What a restart, a fail-over or an administrator does to them."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    execute(place.url, f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}")


def rows(place: Place, sql: str) -> list[Any]:
    """What a statement finds in a SQLite file."""
    db = sqlite3.connect(place.file)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()
