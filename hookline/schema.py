"""The schema's history: a thin wrapper of Peewee's own migration runner (`playhouse.migrations`).

It opens the connection, lets one process migrate at a time, and checks the foreign keys afterwards, all of which the
runner leaves to its caller.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from peewee import Database
from playhouse.migrations import Runner
from playhouse.schema_diff import diff_models

import models
from hookline.database import alone, connected, is_postgres
from hookline.errors import Conflict, HooklineError, Invalid, Unavailable
from hookline.failures import LOCKED, error_name, reason

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


def require_usable(db: Database) -> None:
    """Raises Conflict as `require_current` does, and Unavailable if the database takes no writes, as a replica."""
    with connected(db):
        if is_postgres(db) and db.execute_sql("SHOW transaction_read_only").fetchone()[0] == "on":
            raise Unavailable("the database is read-only")
        require_current(db)


def up(db: Database, target: str | None = None, directory: Path = DIRECTORY) -> list[str]:
    """Apply what is pending, each migration in its own transaction; returns the names applied.

    Raises Invalid if one fails: it is rolled back, those before it stay.
    """
    return _run(db, directory, target, lambda runner: runner.up(target))


def down(db: Database, target: str | None = None, directory: Path = DIRECTORY) -> list[str]:
    """Revert the newest migration, or all back through `target`; returns the names reverted. Raises Invalid."""
    return _run(db, directory, target, lambda runner: runner.down(target))


def create(db: Database, name: str, directory: Path = DIRECTORY) -> Path:
    """A new, numbered, empty migration script; returns its path."""
    return Path(Runner(db, str(directory)).create(name))


def diff(db: Database) -> str:
    """What the database lacks or has too much against the models; '' when they agree."""
    with connected(db):
        found = diff_models(db, models.TABLES)
    return str(found) if found else ""


def _run(db: Database, directory: Path, target: str | None, action: Callable[[Runner], list[str]]) -> list[str]:
    runner = Runner(db, str(directory))
    if target is not None and not (directory / f"{target}.py").exists():
        raise Invalid(f"there is no migration {target}: see  python manage.py migrate status")
    with connected(db), alone(db, ADVISORY_LOCK):
        try:
            names = action(runner)
        except HooklineError:
            raise
        except Exception as exc:  # a script may raise anything
            _forget_empty_history(runner)
            held = ": something else uses these tables, try again" if error_name(exc) == LOCKED else ""
            raise Invalid(f"migration failed, and was rolled back: {reason(exc)}{held}") from exc
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
