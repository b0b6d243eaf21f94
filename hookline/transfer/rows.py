"""The rows of a table in one form, whichever database they are read from: for copying and for comparing."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from peewee import BooleanField, Database, Model

from hookline import tables
from hookline.errors import Invalid
from hookline.store import sql
from hookline.tables import UtcField, read_time, stored_time

BATCH = 2000  # rows in one transaction
LARGE_BATCH = 200  # of a table whose rows may be as long as MAX_PAYLOAD

CopiedRow = tuple[Any, ...]  # the values of a table's columns, in their order


class CopiedTable(NamedTuple):
    """A table and how its values are brought into the one form."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    times: tuple[int, ...]  # positions among the columns
    booleans: tuple[int, ...]

    @classmethod
    def of(cls, model: type[Model]) -> CopiedTable:
        meta: Any = model._meta
        fields = meta.sorted_fields
        composite = meta.composite_key
        key = [meta.fields[name] for name in meta.primary_key.field_names] if composite else [meta.primary_key]
        return cls(
            name=meta.table_name,
            columns=tuple(field.column_name for field in fields),
            key=tuple(field.column_name for field in key),
            times=tuple(position for position, field in enumerate(fields) if isinstance(field, UtcField)),
            booleans=tuple(position for position, field in enumerate(fields) if isinstance(field, BooleanField)),
        )

    @property
    def batch(self) -> int:
        return LARGE_BATCH if "payload" in self.columns else BATCH

    def canonical(self, row: Sequence[Any]) -> CopiedRow:
        """The row with its times as text and its booleans as such. Raises Invalid for a value that is neither."""
        values = list(row)
        for position in self.times:
            try:
                moment = read_time(values[position])
                values[position] = None if moment is None else stored_time(moment)
            except (ValueError, TypeError, OverflowError):
                raise Invalid(f"{self.name_of(row)}: {self.columns[position]} is not a time") from None
        for position in self.booleans:
            values[position] = None if values[position] is None else bool(values[position])
        for column, value in zip(self.columns, values, strict=True):
            if isinstance(value, bytes):
                raise Invalid(f"{self.name_of(row)}: {column} is not text")
        return tuple(values)

    def key_of(self, row: Sequence[Any]) -> list[Any]:
        return [row[self.columns.index(name)] for name in self.key]

    def name_of(self, row: Sequence[Any]) -> str:
        return f"{self.name} {' '.join(map(str, self.key_of(row)))}"


# Tables that others refer to come first. Left out are the workers: they deliver from the source, not from the target.
TABLES = [CopiedTable.of(model) for model in tables.TABLES if model is not tables.Heartbeat]


def count(db: Database, table: CopiedTable) -> int:
    return int(db.execute_sql(f"SELECT count(*) FROM {table.name}").fetchone()[0])


def checksum(db: Database, table: CopiedTable, batch: int, progress: Callable[[int], None]) -> tuple[int, str]:
    """The number of rows, and the sum of their SHA-256s: the databases sort text differently."""
    done, total = 0, 0
    for rows in read_batches(db, table, batch):
        for row in rows:
            digest = hashlib.sha256(json.dumps(row, separators=(",", ":")).encode()).digest()
            total += int.from_bytes(digest, "big")
        progress(done := done + len(rows))
    return done, f"{total % 2**256:064x}"


def read_batches(
    db: Database, table: CopiedTable, size: int, after: Sequence[Any] | None = None
) -> Iterator[list[CopiedRow]]:
    """The rows in the one form, by primary key, from the row behind the key `after`. Raises Invalid."""
    key = ", ".join(table.key)
    behind = f" WHERE ({key}) > ({', '.join(sql.param(db, name) for name in table.key)})"
    begin = f"SELECT {', '.join(table.columns)} FROM {table.name}"
    end = f" ORDER BY {key} LIMIT {size}"
    while True:
        statement = begin + (behind if after else "") + end
        try:
            stored = db.execute_sql(statement, dict(zip(table.key, after, strict=True)) if after else {}).fetchall()
        except sqlite3.OperationalError as exc:  # of fetchall, which Peewee does not wrap: a text is not UTF-8
            raise Invalid(f"{table.name}: a text of the {size} rows behind {after or 'the first'} is broken") from exc
        if stored:
            rows = [table.canonical(row) for row in stored]
            after = table.key_of(rows[-1])
            yield rows
        if len(stored) < size:
            return
