"""The handles that this process has on the file of a SQLite database."""

from __future__ import annotations

import os
from contextlib import suppress

from peewee import Database


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
