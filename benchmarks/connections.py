"""The cost of checking a connection out of the SQLite pool and giving it back, as each request does."""

from __future__ import annotations

import sqlite3
import tempfile
import timeit
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from benchmarks import server
from benchmarks.report import Figure
from hookline.store.open import open_database

CALLS = 2000


def run() -> list[Figure]:
    with tempfile.TemporaryDirectory(dir=server.DISK) as name:
        path = server.migrated(Path(name))
        db = open_database(f"sqlite:///{path}")
        checked_out = shortest(lambda: db.connect() and db.close())
        db.close_all()  # type: ignore[attr-defined]
        with closing(sqlite3.connect(path, isolation_level=None)) as bare:
            by_key = "SELECT url FROM webhooks WHERE webhook_id = ?"
            selected = shortest(lambda: bare.execute(by_key, ("x",)).fetchone())
    claim, against = "connection out of the pool and back", f"a bare SELECT by key: {selected * 1e6:.1f} µs"
    return [Figure(claim, f"{checked_out * 1e6:.1f} µs", against, checked_out / selected, "<= 1")]


def shortest(call: Callable[[], object]) -> float:
    """Seconds for one call, where nothing else disturbed it."""
    return min(timeit.repeat(call, number=CALLS, repeat=100)) / CALLS
