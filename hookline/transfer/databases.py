"""Copying everything from one database into another: SQLite to PostgreSQL, or back.

The source is read in one snapshot, in batches by primary key. Each batch is one transaction on the target with the
note, in the table `hookline_copy`, of how far it got: a copy that was interrupted goes on where it was, and no service
starts on a half-copied database. At the end every row is read back from both sides and compared.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from peewee import Database, DatabaseError, IntegrityError

from hookline.errors import Conflict, Invalid, Unavailable
from hookline.store import schema, sql
from hookline.store.failures import SENTENCES, error_name, in_peewees_words, is_lost, reason, sentence_for
from hookline.store.locks import exclusive
from hookline.store.pool import is_postgres
from hookline.store.units import connected
from hookline.transfer.progress import Progress, silent
from hookline.transfer.rows import BATCH, TABLES, CopiedRow, CopiedTable, checksum, count, read_batches

ADVISORY_LOCK = 0x686F6F6B636F7079  # "hookcopy", on PostgreSQL
NOTES = schema.UNFINISHED_COPY
WRITTEN_TO = (
    "the source was written to meanwhile, or the target. Stop what writes to them, and run it again with --overwrite"
)
IN_USE = "a service, a worker or a command of Hookline is connected to the target: stop it first"
SAME = "--from and --to are the same database"
OTHERS = """
    SELECT 1 FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'hookline' AND pid <> pg_backend_pid()"""


class Intent(Enum):
    """The beginning of a copy. The values are for the user, behind "would" or "to do:"."""

    CREATE = "create and migrate the target"
    MIGRATE = "migrate the target, which has none of our tables"
    RESUME = "go on with the copy that was interrupted"
    FILL = "fill the target's empty tables"
    OVERWRITE = "delete all rows of the target first"


class Compared(NamedTuple):
    """A table on both sides. The checksum is of all its rows, whatever their order."""

    table: str
    rows: int
    checksum: str
    same: bool


def plan(source: Database, target: Database | None, overwrite: bool = False) -> tuple[dict[str, int], Intent]:
    """The number of rows of each table of the source, and how a copy would begin (target None: there is no file yet).

    Changes nothing. Raises Conflict where `copy` would refuse, Invalid, Unavailable.
    """
    with connected(source):
        _require_migrated(source)
        rows = {table.name: count(source, table) for table in TABLES}
    if target is None:
        return rows, Intent.CREATE
    _refuse_same(source, target)
    _refuse_in_use(target)
    with connected(source), connected(target), alone_on(source, target):
        return rows, _intent(source, target, overwrite)


def copy(
    source: Database,
    target: Database,
    *,
    overwrite: bool = False,
    batch: int = BATCH,
    progress: Progress = silent,
) -> list[Compared]:
    """Copy every row, or go on with a copy that was interrupted; returns the comparison of each table.

    Raises Conflict if the target is not empty (unless `overwrite`), is in use, or differs at the end because the source
    was written to meanwhile; Invalid for what the target cannot store; Unavailable: run again, it goes on.
    """
    try:
        if plan(source, target, overwrite)[1] is Intent.MIGRATE:
            schema.up(target)
        with connected(source), connected(target), alone_on(source, target), snapshot(source):
            if _intent(source, target, overwrite) is not Intent.RESUME:
                _begin(source, target)
            return _copy_and_compare(source, target, batch, progress)
    except Unavailable as exc:
        why = reason(exc.__cause__ or exc)
        raise Unavailable(f"the copy was interrupted: {why}. Run it again, and it goes on") from exc


def _copy_and_compare(source: Database, target: Database, batch: int, progress: Progress) -> list[Compared]:
    for table in TABLES:
        _copy_table(source, target, table, min(batch, table.batch), progress)
    _keep_ids_unique(source, target)
    compared = [_compare(source, target, table, min(batch, table.batch), progress) for table in TABLES]
    if different := [comparison.table for comparison in compared if not comparison.same]:
        raise Conflict(f"the copy differs in {', '.join(different)}: {WRITTEN_TO}")
    if is_postgres(target):
        target.execute_sql(f"ANALYZE {', '.join(table.name for table in TABLES)}")
    target.execute_sql(f"DROP TABLE {NOTES}")
    return compared


def _require_migrated(source: Database) -> None:
    try:
        schema.require_current(source)
    except Conflict as exc:
        raise Conflict(f"--from cannot be read: {exc}, with DATABASE_URL set to it") from exc


def _intent(source: Database, target: Database, overwrite: bool) -> Intent:
    """Decide how to begin with the target as it is. Raises Conflict."""
    existing = set(target.get_tables())
    ours = [table.name for table in TABLES if table.name in existing]
    if not ours:
        return Intent.MIGRATE
    if pending := schema.pending(target):
        if len(pending) == len(schema.status(target)):
            raise Conflict(f"the target has tables of another program: {', '.join(ours)}. Use an empty database")
        up = "python manage.py migrate up, with DATABASE_URL set to it"
        raise Conflict(f"the target needs migrating ({', '.join(pending)}): run  {up}")
    if NOTES in existing and not overwrite:
        if target.execute_sql(f"SELECT source FROM {NOTES} LIMIT 1").fetchone() == (identity(source),):
            return Intent.RESUME
        raise Conflict("the target holds an unfinished copy of another source: use --overwrite to begin anew")
    rows = {table.name: count(target, table) for table in TABLES}
    if not any(rows.values()):
        return Intent.FILL
    if not overwrite:
        filled = ", ".join(f"{number} {name}" for name, number in rows.items() if number)
        raise Conflict(f"the target is not empty: {filled}. Use --overwrite to delete them first")
    return Intent.OVERWRITE


def _begin(source: Database, target: Database) -> None:
    """Empty the target's tables, and make the notes of this copy."""
    note = f"INSERT INTO {NOTES} VALUES ({sql.param(target, 'source')}, {sql.param(target, 'name')}, NULL, 0)"
    with target.atomic():
        if is_postgres(target):
            target.execute_sql(f"TRUNCATE {', '.join(table.name for table in TABLES)}")
        else:
            for table in reversed(TABLES):
                target.execute_sql(f"DELETE FROM {table.name}")
        target.execute_sql(f"DROP TABLE IF EXISTS {NOTES}")
        target.execute_sql(f"CREATE TABLE {NOTES} (source TEXT, name TEXT PRIMARY KEY, last_key TEXT, done BIGINT)")
        for table in TABLES:
            target.execute_sql(note, {"source": identity(source), "name": table.name})


def _copy_table(source: Database, target: Database, table: CopiedTable, batch: int, progress: Progress) -> None:
    name, key, rows_done = (sql.param(target, name) for name in ("name", "last_key", "done"))
    note = f"UPDATE {NOTES} SET last_key = {key}, done = {rows_done} WHERE name = {name}"
    read = f"SELECT last_key, done FROM {NOTES} WHERE name = {name}"
    last_key, done = target.execute_sql(read, {"name": table.name}).fetchone()
    total = count(source, table)
    for rows in read_batches(source, table, batch, json.loads(last_key) if last_key else None):
        done += len(rows)
        last_key = json.dumps(table.key_of(rows[-1]))
        try:
            with target.atomic(), in_peewees_words:
                _write(target, table, rows)
                target.execute_sql(note, {"last_key": last_key, "done": done, "name": table.name})
        except IntegrityError as exc:
            problem = f"{table.name}: a row is there already, or what it belongs to is missing"
            raise Conflict(f"{problem}; {WRITTEN_TO}") from exc
        except DatabaseError as exc:
            if is_lost(exc) or error_name(exc) in SENTENCES:
                raise
            between = f"{table.name_of(rows[0])} to {' '.join(map(str, table.key_of(rows[-1])))}"
            raise Invalid(f"{between}: the target cannot store one of these rows: {reason(exc)}") from exc
        progress(f"copied {table.name}", done, total)


def _write(target: Database, table: CopiedTable, rows: list[CopiedRow]) -> None:
    columns = ", ".join(table.columns)
    if not is_postgres(target):
        insert = f"INSERT INTO {table.name} ({columns}) VALUES ({', '.join('?' * len(table.columns))})"
        target.connection().executemany(insert, rows)
        return
    for row in rows:
        for name, value in zip(table.columns, row, strict=True):
            if isinstance(value, str) and "\0" in value:
                raise Invalid(f"{table.name_of(row)}: {name} has a NUL character, which PostgreSQL cannot store")
    with target.cursor() as cursor, cursor.copy(f"COPY {table.name} ({columns}) FROM STDIN") as stream:
        for row in rows:
            stream.write_row(row)


def _keep_ids_unique(source: Database, target: Database) -> None:
    """Let the target number its deliveries on from the highest id that the source has ever given out."""
    if is_postgres(source):
        last = source.execute_sql("SELECT last_value FROM deliveries_delivery_id_seq").fetchone()[0]
    else:
        sequence = source.execute_sql("SELECT seq FROM sqlite_sequence WHERE name = 'deliveries'").fetchone()
        last = max(sequence[0] if sequence else 0, 1)
    last_id = sql.param(target, "last")
    with target.atomic():
        if is_postgres(target):
            target.execute_sql(f"SELECT setval('deliveries_delivery_id_seq', {last_id})", {"last": last})
        else:
            target.execute_sql("DELETE FROM sqlite_sequence WHERE name = 'deliveries'")
            insert = f"INSERT INTO sqlite_sequence (name, seq) VALUES ('deliveries', {last_id})"
            target.execute_sql(insert, {"last": last})


def _compare(source: Database, target: Database, table: CopiedTable, batch: int, progress: Progress) -> Compared:
    total, stage = 2 * count(source, table), f"compared {table.name}"
    rows, digest = checksum(source, table, batch, lambda done: progress(stage, done, total))
    copied = checksum(target, table, batch, lambda done: progress(stage, rows + done, total))
    return Compared(table.name, rows, digest, same=copied == (rows, digest))


@contextmanager
def alone_on(source: Database, target: Database) -> Iterator[None]:
    """Lock both databases for one copy at a time. Raises Conflict if the target is in use.

    Raises Conflict also if both are one database, under whatever names its host has: the second lock is taken already.
    """
    taken = f"{SAME}, or another process copies or migrates one of them"
    with ExitStack() as locks:
        for db in (source, target):
            if is_postgres(db) or db is target:
                locks.enter_context(exclusive(db, ADVISORY_LOCK, taken))
        if is_postgres(target) and target.execute_sql(OTHERS).fetchone():
            raise Conflict(IN_USE)
        yield


def _refuse_in_use(target: Database) -> None:
    """Raises Conflict if another process has this SQLite file open: it cannot be locked whole then."""
    if is_postgres(target):
        return  # `alone_on` asks it
    target.close_all()  # type: ignore[attr-defined]  # connections of our own would be in the way
    probe = sqlite3.connect(target.database, timeout=0)
    try:
        probe.execute("PRAGMA locking_mode = EXCLUSIVE")
        probe.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as exc:
        if error_name(exc) == "SQLITE_BUSY":
            raise Conflict(IN_USE) from exc
        raise Unavailable(sentence_for(exc)) from exc
    finally:
        probe.close()


@contextmanager
def snapshot(db: Database) -> Iterator[None]:
    """Read one state of the database, whatever is written meanwhile."""
    db.execute_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if is_postgres(db) else "BEGIN DEFERRED")
    try:
        yield
    finally:
        db.execute_sql("ROLLBACK")


def identity(db: Database) -> str:
    """The name of a database in the notes of a copy, without a user or password."""
    if not is_postgres(db):
        return f"sqlite {Path(db.database).resolve()}"
    parameters: dict[str, Any] = db.connect_params
    address = [parameters.get(name, "") for name in ("service", "host", "hostaddr", "port")]
    return " ".join(["postgresql", *map(str, address), db.database])


def _refuse_same(source: Database, target: Database) -> None:
    files = [Path(db.database) for db in (source, target) if not is_postgres(db)]
    one_file = len(files) == 2 and all(file.exists() for file in files) and files[0].samefile(files[1])
    if one_file or identity(source) == identity(target):
        raise Invalid(SAME)
