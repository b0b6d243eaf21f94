"""The schema and its migrations: a thin wrapper of Peewee's runner (`playhouse.migrations`).

It does what the runner leaves to its caller: opens the connection, lets one process migrate at a time, makes all
migrations of a run one transaction, and checks the foreign keys at its end.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from inspect import getfile
from pathlib import Path
from typing import Literal

from peewee import Database
from playhouse.migrations import Runner
from playhouse.schema_diff import diff_models

from hookline import tables
from hookline.errors import Conflict, HooklineError, Invalid, Unavailable
from hookline.store.failures import LOCKED, error_name, reason
from hookline.store.locks import exclusive
from hookline.store.pool import is_postgres
from hookline.store.units import connected

ADVISORY_LOCK = 0x686F6F6B6C696E65  # "hookline"; one lock of a PostgreSQL database, for migrations
UNFINISHED_COPY = "hookline_copy"  # a table that exists while a copy into this database is unfinished
DIRECTORY = Path(getfile(tables.Webhook)).resolve().parent / "migrations"  # beside models.py, also in a wheel


def status(db: Database, directory: Path = DIRECTORY) -> list[tuple[str, datetime | None]]:
    """List every migration in order, with the time it was applied (None: pending). Raises Unavailable."""
    with connected(db):
        return [(migration.name, migration.applied) for migration in Runner(db, str(directory)).status()]


def pending(db: Database, directory: Path = DIRECTORY) -> list[str]:
    """List the names of the migrations that are not applied yet. Raises Unavailable."""
    return [name for name, applied in status(db, directory) if applied is None]


def require_current(db: Database, directory: Path = DIRECTORY) -> None:
    """Raise Conflict, with the command to run, if migrations are pending or a copy into it is not finished."""
    with connected(db):
        if db.table_exists(UNFINISHED_COPY):
            raise Conflict("a copy into this database was not finished: run  python manage.py copy  again")
    if names := pending(db, directory):
        raise Conflict(f"the database needs migrating ({', '.join(names)}): run  python manage.py migrate up")


def require_usable(db: Database) -> None:
    """Raise Conflict as `require_current` does, and Unavailable if the database is read-only, such as a replica."""
    with connected(db):
        if is_postgres(db) and db.execute_sql("SHOW transaction_read_only").fetchone()[0] == "on":
            raise Unavailable("the database is read-only")
        require_current(db)


def up(db: Database, target: str | None = None, directory: Path = DIRECTORY) -> list[str]:
    """Apply what is pending, through `target` if given, all or nothing; returns the names applied.

    Raises Invalid if one fails.
    """
    return _run(db, directory, target, "up")


def down(db: Database, target: str | None = None, directory: Path = DIRECTORY) -> list[str]:
    """Revert the newest migration, or all back through `target`, all or nothing; returns the names reverted.

    Raises Invalid if one fails.
    """
    return _run(db, directory, target, "down")


def create(db: Database, name: str, directory: Path = DIRECTORY) -> Path:
    """Write a new, numbered, empty migration script; returns its path."""
    return Path(Runner(db, str(directory)).create(name))


def diff(db: Database) -> str:
    """Describe how the database differs from the models; '' if it does not."""
    with connected(db):
        difference = diff_models(db, tables.TABLES)
    return str(difference) if difference else ""


def _run(db: Database, directory: Path, target: str | None, direction: Literal["up", "down"]) -> list[str]:
    runner = Runner(db, str(directory))
    if target is not None and not (directory / f"{target}.py").exists():
        raise Invalid(f"there is no migration {target}: see  python manage.py migrate status")
    with connected(db), exclusive(db, ADVISORY_LOCK):
        if not any(bool(migration.applied) == (direction == "down") for migration in runner.status()):
            return []  # before a transaction begins, which might wait for another
        try:
            # The contexts of the runner become savepoints in this one. On SQLite foreign keys are off in it.
            with runner.migrator.migration_context():
                broken = _broken_references(db)
                names: list[str] = runner.up(target) if direction == "up" else runner.down(target)
                _refuse_more(_broken_references(db) - broken)
        except HooklineError:
            raise
        except Exception as exc:  # a script may raise anything
            hint = ": something else uses these tables, try again" if error_name(exc) == LOCKED else ""
            raise Invalid(f"migration failed, and everything was rolled back: {reason(exc)}{hint}") from exc
    return names


def _broken_references(db: Database) -> Counter[str]:
    """Count, for each table, the rows that point at rows which are gone."""
    if is_postgres(db):  # which never lets them break
        return Counter()
    return Counter(table for table, *_ in db.execute_sql("PRAGMA foreign_key_check").fetchall())


def _refuse_more(broken: Counter[str]) -> None:
    if broken:
        first = min(broken)
        why = f"{broken.total()} rows would point at rows that are gone, the first in the table {first}"
        raise Invalid(f"migration failed, and everything was rolled back: {why}")
