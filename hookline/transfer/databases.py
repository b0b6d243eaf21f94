"""Copying everything from one database into another: SQLite to PostgreSQL, or back.

The source is read in one snapshot, in batches by primary key. Each batch is one transaction on the target with the
note, in the table `hookline_copy`, of how far it got: a copy that was interrupted goes on where it was, and no service
starts on a half-copied database. At the end every row is read back from both sides and compared.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peewee import BooleanField, Database, DatabaseError, IntegrityError, Model

from hookline import tables
from hookline.errors import Conflict, Invalid, Unavailable
from hookline.store import schema
from hookline.store.failures import SENTENCES, error_name, in_peewees_words, is_lost, reason, sentence_for
from hookline.store.locks import exclusive
from hookline.store.pool import is_postgres
from hookline.store.units import connected
from hookline.tables import UtcField, read_time, stored_time

ADVISORY_LOCK = 0x686F6F6B636F7079  # "hookcopy", on PostgreSQL
BATCH = 2000  # rows in one transaction
LARGE_BATCH = 200  # of a table whose rows may be as long as MAX_PAYLOAD
NOTES = schema.UNFINISHED_COPY

Progress = Callable[[str, int, int], None]  # what is done, rows, of how many
Row = tuple[Any, ...]


class Compared(NamedTuple):
    """A table on both sides. The checksums are of all its rows, whatever their order."""

    table: str
    rows: int
    checksum: str
    same: bool


class Table(NamedTuple):
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    times: tuple[int, ...]  # places among the columns
    booleans: tuple[int, ...]

    @classmethod
    def of(cls, model: type[Model]) -> Table:
        meta: Any = model._meta
        fields = meta.sorted_fields
        composite = meta.composite_key
        key = [meta.fields[name] for name in meta.primary_key.field_names] if composite else [meta.primary_key]
        return cls(
            meta.table_name,
            tuple(field.column_name for field in fields),
            tuple(field.column_name for field in key),
            tuple(place for place, field in enumerate(fields) if isinstance(field, UtcField)),
            tuple(place for place, field in enumerate(fields) if isinstance(field, BooleanField)),
        )

    @property
    def batch(self) -> int:
        return LARGE_BATCH if "payload" in self.columns else BATCH

    def canonical(self, row: Sequence[Any]) -> Row:
        """The same values from either database: times as text, booleans as such. Raises Invalid for what is neither."""
        values = list(row)
        for place in self.times:
            try:
                moment = read_time(values[place])
                values[place] = None if moment is None else stored_time(moment)
            except (ValueError, TypeError, OverflowError):
                raise Invalid(f"{self.name_of(row)}: {self.columns[place]} is not a time") from None
        for place in self.booleans:
            values[place] = None if values[place] is None else bool(values[place])
        for place, value in enumerate(values):
            if isinstance(value, bytes):
                raise Invalid(f"{self.name_of(row)}: {self.columns[place]} is not text")
        return tuple(values)

    def key_of(self, row: Sequence[Any]) -> list[Any]:
        return [row[self.columns.index(name)] for name in self.key]

    def name_of(self, row: Sequence[Any]) -> str:
        return f"{self.name} {' '.join(map(str, self.key_of(row)))}"


# What others point at comes first. Who delivers from the source does not deliver from the target.
TABLES = [Table.of(model) for model in tables.TABLES if model is not tables.Worker]


def plan(source: Database, target: Database | None, overwrite: bool = False) -> tuple[dict[str, int], str]:
    """The rows of each table of the source, and what would be done with the target (None: it is not there yet).

    Changes nothing. Raises Conflict where `copy` would refuse, Invalid, Unavailable.
    """
    with connected(source):
        _require_migrated(source)
        rows = {table.name: count(source, table) for table in TABLES}
    if target is None:
        return rows, "create and migrate the target"
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
    progress: Progress = lambda what, done, total: None,
) -> list[Compared]:
    """Copy every row, or go on with a copy that was interrupted; returns the comparison of each table.

    Raises Conflict if the target is not empty (unless `overwrite`), is in use, or differs at the end because the source
    was written to meanwhile; Invalid for what the target cannot store; Unavailable: run again, it goes on.
    """
    try:
        if plan(source, target, overwrite)[1] == MIGRATE:
            schema.up(target)
        with connected(source), connected(target), alone_on(source, target), snapshot(source):
            if _intent(source, target, overwrite) != GO_ON:
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
    if different := [one.table for one in compared if not one.same]:
        raise Conflict(f"the copy differs in {', '.join(different)}: {WRITTEN_TO}")
    if is_postgres(target):
        target.execute_sql(f"ANALYZE {', '.join(table.name for table in TABLES)}")
    target.execute_sql(f"DROP TABLE {NOTES}")
    return compared


WRITTEN_TO = (
    "the source was written to meanwhile, or the target. Stop what writes to them, and run it again with --overwrite"
)
GO_ON = "go on with the copy that was interrupted"
MIGRATE = "migrate the target, which has none of our tables"
FILL = "fill the target's empty tables"
OVERWRITE = "delete all rows of the target first"


def _require_migrated(source: Database) -> None:
    try:
        schema.require_current(source)
    except Conflict as exc:
        raise Conflict(f"--from cannot be read: {exc}, with DATABASE_URL set to it") from exc


def _intent(source: Database, target: Database, overwrite: bool) -> str:
    """What to do with the target as it is. Raises Conflict."""
    there = set(target.get_tables())
    ours = [table.name for table in TABLES if table.name in there]
    if not ours:
        return MIGRATE
    if pending := schema.pending(target):
        if len(pending) == len(schema.status(target)):
            raise Conflict(f"the target has tables of another program: {', '.join(ours)}. Use an empty database")
        up = "python manage.py migrate up, with DATABASE_URL set to it"
        raise Conflict(f"the target needs migrating ({', '.join(pending)}): run  {up}")
    if NOTES in there and not overwrite:
        begun = target.execute_sql(f"SELECT source FROM {NOTES} LIMIT 1").fetchone()
        if begun == (identity(source),):
            return GO_ON
        raise Conflict("the target holds an unfinished copy of another source: use --overwrite to begin anew")
    rows = {table.name: count(target, table) for table in TABLES}
    if not any(rows.values()):
        return FILL
    if not overwrite:
        found = ", ".join(f"{number} {name}" for name, number in rows.items() if number)
        raise Conflict(f"the target is not empty: {found}. Use --overwrite to delete them first")
    return OVERWRITE


def _begin(source: Database, target: Database) -> None:
    """Empty tables, and the notes of this copy."""
    with target.atomic():
        if is_postgres(target):
            target.execute_sql(f"TRUNCATE {', '.join(table.name for table in TABLES)}")
        else:
            for table in reversed(TABLES):
                target.execute_sql(f"DELETE FROM {table.name}")
        target.execute_sql(f"DROP TABLE IF EXISTS {NOTES}")
        target.execute_sql(f"CREATE TABLE {NOTES} (source TEXT, name TEXT PRIMARY KEY, last_key TEXT, done BIGINT)")
        for table in TABLES:
            values = ", ".join([target.param] * 4)
            target.execute_sql(f"INSERT INTO {NOTES} VALUES ({values})", (identity(source), table.name, None, 0))


def _copy_table(source: Database, target: Database, table: Table, batch: int, progress: Progress) -> None:
    read = f"SELECT last_key, done FROM {NOTES} WHERE name = {target.param}"
    note = f"UPDATE {NOTES} SET last_key = {target.param}, done = {target.param} WHERE name = {target.param}"
    last_key, done = target.execute_sql(read, (table.name,)).fetchone()
    total = count(source, table)
    for rows in read_batches(source, table, batch, json.loads(last_key) if last_key else None):
        done += len(rows)
        try:
            with target.atomic(), in_peewees_words:
                _write(target, table, rows)
                target.execute_sql(note, (json.dumps(table.key_of(rows[-1])), done, table.name))
        except IntegrityError as exc:
            problem = f"{table.name}: a row is there already, or what it belongs to is missing"
            raise Conflict(f"{problem}; {WRITTEN_TO}") from exc
        except DatabaseError as exc:
            if is_lost(exc) or error_name(exc) in SENTENCES:
                raise
            between = f"{table.name_of(rows[0])} to {' '.join(map(str, table.key_of(rows[-1])))}"
            raise Invalid(f"{between}: the target cannot store one of these rows: {reason(exc)}") from exc
        progress(f"copied {table.name}", done, total)


def _write(target: Database, table: Table, rows: list[Row]) -> None:
    columns = ", ".join(table.columns)
    if not is_postgres(target):
        slots = ", ".join("?" * len(table.columns))
        target.connection().executemany(f"INSERT INTO {table.name} ({columns}) VALUES ({slots})", rows)
        return
    for row in rows:
        for name, value in zip(table.columns, row, strict=True):
            if isinstance(value, str) and "\0" in value:
                raise Invalid(f"{table.name_of(row)}: {name} has a NUL character, which PostgreSQL cannot store")
    with target.cursor() as cursor, cursor.copy(f"COPY {table.name} ({columns}) FROM STDIN") as stream:
        for row in rows:
            stream.write_row(row)


def _keep_ids_unique(source: Database, target: Database) -> None:
    """The ids of deliveries go on above all that the source has ever given."""
    if is_postgres(source):
        last = source.execute_sql("SELECT last_value FROM deliveries_delivery_id_seq").fetchone()[0]
    else:
        found = source.execute_sql("SELECT seq FROM sqlite_sequence WHERE name = 'deliveries'").fetchone()
        last = max(found[0] if found else 0, 1)
    with target.atomic():
        if is_postgres(target):
            target.execute_sql("SELECT setval('deliveries_delivery_id_seq', %s)", (last,))
        else:
            target.execute_sql("DELETE FROM sqlite_sequence WHERE name = 'deliveries'")
            target.execute_sql("INSERT INTO sqlite_sequence (name, seq) VALUES ('deliveries', ?)", (last,))


def _compare(source: Database, target: Database, table: Table, batch: int, progress: Progress) -> Compared:
    total = count(source, table)
    rows, first = checksum(source, table, batch, lambda done: progress(f"compared {table.name}", done, 2 * total))
    again, second = checksum(
        target, table, batch, lambda done: progress(f"compared {table.name}", rows + done, 2 * total)
    )
    return Compared(table.name, rows, first, (rows, first) == (again, second))


def checksum(db: Database, table: Table, batch: int, progress: Callable[[int], None]) -> tuple[int, str]:
    """The number of rows, and the sum of their SHA-256s: the databases sort text differently."""
    done, total = 0, 0
    for rows in read_batches(db, table, batch):
        for row in rows:
            digest = hashlib.sha256(json.dumps(row, separators=(",", ":")).encode()).digest()
            total += int.from_bytes(digest, "big")
        progress(done := done + len(rows))
    return done, f"{total % 2**256:064x}"


def read_batches(db: Database, table: Table, size: int, after: Sequence[Any] | None = None) -> Iterator[list[Row]]:
    """The rows in canonical form, by primary key, from the one behind the key `after`."""
    key = ", ".join(table.key)
    begin = f"SELECT {', '.join(table.columns)} FROM {table.name}"
    end = f" ORDER BY {key} LIMIT {size}"
    behind = f" WHERE ({key}) > ({', '.join([db.param] * len(table.key))})"
    while True:
        try:
            found = db.execute_sql(begin + (behind if after else "") + end, tuple(after or ())).fetchall()
        except sqlite3.OperationalError as exc:  # of fetchall, so not in Peewee's clothes: a text is not UTF-8
            raise Invalid(f"{table.name}: a text of the {size} rows behind {after or 'the first'} is broken") from exc
        if found:
            rows = [table.canonical(row) for row in found]
            after = table.key_of(rows[-1])
            yield rows
        if len(found) < size:
            return


@contextmanager
def alone_on(source: Database, target: Database) -> Iterator[None]:
    """One copy at a time, never from a database into itself, whatever names its host has, and nobody else at work.

    Raises Conflict.
    """
    busy = "--from and --to are the same database, or another process copies or migrates one of them"
    with ExitStack() as locks:
        for db in (source, target):
            if is_postgres(db) or db is target:
                locks.enter_context(exclusive(db, ADVISORY_LOCK, busy))
        if is_postgres(target) and target.execute_sql(OTHERS).fetchone():
            raise Conflict(IN_USE)
        yield


def _refuse_in_use(target: Database) -> None:
    """Raises Conflict if another process has this SQLite file open: none other can lock it then."""
    if is_postgres(target):
        return  # `alone_on` asks it
    target.close_all()  # type: ignore[attr-defined]  # what we have open ourselves would be in the way
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


IN_USE = "a service, a worker or a command of Hookline is connected to the target: stop it first"
OTHERS = """
    SELECT 1 FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'hookline' AND pid <> pg_backend_pid()"""


@contextmanager
def snapshot(db: Database) -> Iterator[None]:
    """Read one state of the database, whatever is written meanwhile."""
    db.execute_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if is_postgres(db) else "BEGIN DEFERRED")
    try:
        yield
    finally:
        db.execute_sql("ROLLBACK")


def count(db: Database, table: Table) -> int:
    return int(db.execute_sql(f"SELECT count(*) FROM {table.name}").fetchone()[0])


def identity(db: Database) -> str:
    """Which database this is, without a user or password."""
    if not is_postgres(db):
        return f"sqlite {Path(db.database).resolve()}"
    parameters: dict[str, Any] = db.connect_params
    given = [parameters.get(name, "") for name in ("service", "host", "hostaddr", "port")]
    return " ".join(["postgresql", *map(str, given), db.database])


def _refuse_same(source: Database, target: Database) -> None:
    files = [Path(db.database) for db in (source, target) if not is_postgres(db)]
    one_file = len(files) == 2 and all(file.exists() for file in files) and files[0].samefile(files[1])
    if one_file or identity(source) == identity(target):
        raise Invalid("--from and --to are the same database")
