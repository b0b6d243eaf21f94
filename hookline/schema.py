"""The schema's history: a thin wrapper of Peewee's own migration runner (`playhouse.migrations`).

It opens the connection, lets one process migrate at a time, and checks the foreign keys afterwards, all of which the
runner leaves to its caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from peewee import Database
from playhouse.migrations import Runner
from playhouse.schema_diff import diff_models

import models
from hookline.database import LOCK_TIMEOUT, connected, is_postgres
from hookline.errors import Conflict, HooklineError, Invalid

ADVISORY_LOCK = 0x686F6F6B6C696E65  # "hookline"; one lock of a PostgreSQL database, for migrations
UNFINISHED_COPY = "hookline_copy"  # a table that is there while one goes on
DIRECTORY = Path(__file__).resolve().parent.parent / "migrations"


def status(db: Database, directory: Path = DIRECTORY) -> list[tuple[str, datetime | None]]:
    """Every migration in order, with the time it was applied (None: pending)."""
    with connected(db):
        return [(migration.name, migration.applied) for migration in Runner(db, str(directory)).status()]


def pending(db: Database, directory: Path = DIRECTORY) -> list[str]:
    """The names of the migrations that are not applied yet. Raises Unavailable."""
    return [name for name, applied in status(db, directory) if applied is None]


def require_current(db: Database, directory: Path = DIRECTORY) -> None:
    """Raises Conflict, naming the command to run, while migrations are pending or a copy into it is not finished."""
    with connected(db):
        if db.table_exists(UNFINISHED_COPY):
            raise Conflict("a copy into this database was not finished: run  python manage.py copy  again")
    if names := pending(db, directory):
        raise Conflict(f"the database needs migrating ({', '.join(names)}): run  python manage.py migrate up")


def up(db: Database, target: str | None = None, directory: Path = DIRECTORY) -> list[str]:
    """Apply what is pending, each migration in its own transaction; returns the names applied.

    Raises Invalid if one fails: it is rolled back, those before it stay.
    """
    return _run(db, directory, lambda runner: runner.up(target))


def down(db: Database, target: str | None = None, directory: Path = DIRECTORY) -> list[str]:
    """Revert the newest migration, or all back through `target`; returns the names reverted. Raises Invalid."""
    return _run(db, directory, lambda runner: runner.down(target))


def create(db: Database, name: str, directory: Path = DIRECTORY) -> Path:
    """A new, numbered, empty migration script; returns its path."""
    return Path(Runner(db, str(directory)).create(name))


def diff(db: Database) -> str:
    """What the database lacks or has too much against the models; '' when they agree."""
    with connected(db):
        found = diff_models(db, models.TABLES)
    return str(found) if found else ""


def _run(db: Database, directory: Path, action: Callable[[Runner], list[str]]) -> list[str]:
    runner = Runner(db, str(directory))
    with connected(db), _alone(db):
        try:
            names = action(runner)
        except HooklineError:
            raise
        except Exception as exc:  # a script may raise anything
            _forget_empty_history(runner)
            raise Invalid(f"migration failed, and was rolled back: {exc}") from exc
        _check_foreign_keys(db)
    return names


def _forget_empty_history(runner: Runner) -> None:
    """A first migration that failed leaves nothing behind, not even the runner's table."""
    if runner.History.table_exists() and not runner.applied():
        runner.History.drop_table()


def _check_foreign_keys(db: Database) -> None:
    if is_postgres(db):  # it never lets them break
        return
    broken = db.execute_sql("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise Invalid(f"{len(broken)} rows point at rows that are gone, the first in the table {broken[0][0]}")


@contextmanager
def _alone(db: Database) -> Iterator[None]:
    """One migrating process at a time. SQLite's lock is on the folder, so that no lock file is left behind."""
    if is_postgres(db):
        db.execute_sql("SELECT set_config('lock_timeout', '0', false)")  # to wait for the one that migrates
        db.execute_sql("SELECT pg_advisory_lock(%s)", (ADVISORY_LOCK,))
        db.execute_sql("SELECT set_config('lock_timeout', %s, false)", (f"{LOCK_TIMEOUT}s",))
        try:
            yield
        finally:
            db.execute_sql("SELECT pg_advisory_unlock(%s)", (ADVISORY_LOCK,))
        return
    try:
        import fcntl
    except ImportError:  # Windows: two at once collide, harmlessly
        yield
        return
    folder = os.open(Path(db.database).resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
