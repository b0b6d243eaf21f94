"""Hot statements as text, and the few places where the databases differ in it.

Building a statement with the ORM costs ten times what running it does; running one for each row costs a hand-over of
the GIL each. So what is on a hot path is one statement for a whole set, whose rows come as one JSON parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peewee import Database

from hookline.store.pool import is_postgres
from hookline.store.units import connected


def param(db: Database, name: str) -> str:
    """The parameter of this name: statements are executed with a mapping of names to values."""
    return f"%({name})s" if is_postgres(db) else f":{name}"


def time(db: Database, name: str) -> str:
    """The parameter of this name, which is a time."""
    return f"%({name})s::timestamptz" if is_postgres(db) else f":{name}"


def values(db: Database, name: str, *columns: str) -> str:
    """A FROM item `name` with these columns, whose rows are the parameter of the same name (see `encoded`).

    A column is its name, with its type behind a space unless that is text: `"id bigint"`.
    """
    names = [column.partition(" ")[0] for column in columns]
    if is_postgres(db):
        types = [column.partition(" ")[2] or "text" for column in columns]
        fields = [f"(value ->> {at})::{kind} AS {names[at]}" for at, kind in enumerate(types)]
        return f"(SELECT {', '.join(fields)} FROM json_array_elements({param(db, name)}::json)) AS {name}"
    fields = [f"json_extract(value, '$[{at}]') AS {column}" for at, column in enumerate(names)]
    return f"(SELECT {', '.join(fields)} FROM json_each({param(db, name)})) AS {name}"


def rows(db: Database, *columns: str, alias: str = "given") -> str:
    """A FROM item with these columns, whose rows are the array of arrays in one parameter (see `parameter`).

    A column is its name, with its type behind a space unless that is text: `"place integer"`.
    """
    names = [column.partition(" ")[0] for column in columns]
    if is_postgres(db):
        kinds = [column.partition(" ")[2] or "text" for column in columns]
        fields = [
            f"(value ->> {place})::{kind} AS {name}"
            for place, (name, kind) in enumerate(zip(names, kinds, strict=True))
        ]
        return f"(SELECT {', '.join(fields)} FROM json_array_elements({db.param}::json)) AS {alias}"
    fields = [f"json_extract(value, '$[{place}]') AS {name}" for place, name in enumerate(names)]
    return f"(SELECT {', '.join(fields)} FROM json_each({db.param})) AS {alias}"


def each(db: Database, given: str, tables: str, columns: str, condition: str, *, alias: str) -> str:
    """FROM and WHERE that join `given` with `tables`, by a seek for each given row.

    The columns are `alias.*` outside. PostgreSQL takes the rows of a parameter for a hundred, and might read whole
    tables rather than seek so often: LATERAL and OFFSET 0 make it plan for one row.
    """
    if is_postgres(db):
        return f"FROM {given} CROSS JOIN LATERAL (SELECT {columns} FROM {tables} WHERE {condition} OFFSET 0) AS {alias}"
    return f"FROM {given} CROSS JOIN {tables} WHERE {condition}"


def encoded(rows: Iterable[Sequence[Any]]) -> str:
    """Rows of plain values as the parameter that `values` reads."""
    return json.dumps(list(rows), ensure_ascii=False, separators=(",", ":"))


def encoded_ids(ids: Iterable[Any]) -> str:
    """The parameter for `values` with a single column."""
    return encoded([row_id] for row_id in ids)


def parameter(values: Iterable[Sequence[Any]]) -> str:
    """Rows of plain values as the parameter that `rows` reads."""
    return json.dumps(list(values), ensure_ascii=False, separators=(",", ":"))


def ids(values: Iterable[Any]) -> str:
    """The parameter for `rows` with a single column."""
    return parameter([value] for value in values)


def moment(db: Database) -> str:
    """A parameter that is a time."""
    return f"{db.param}::timestamptz" if is_postgres(db) else db.param


def seconds(db: Database, start: str, end: str) -> str:
    """From one time to another."""
    if is_postgres(db):
        return f"extract(epoch FROM {end} - {start})"
    return f"(julianday({end}) - julianday({start})) * 86400.0"


def later(db: Database, first: str, second: str) -> str:
    """The greater of two values; a null first one is none."""
    return f"greatest({first}, {second})" if is_postgres(db) else f"max(coalesce({first}, {second}), {second})"


def sooner(db: Database, first: str, second: str) -> str:
    return f"least({first}, {second})" if is_postgres(db) else f"min({first}, {second})"


def plan_anew(db: Database) -> None:
    """For the rest of this transaction: plan each statement for the tables as they are now.

    PostgreSQL keeps the plan of a statement that is repeated. One made while a table was nearly empty reads all of it,
    for each row that it looks up, until somebody analyzes the table.
    """
    if is_postgres(db):
        db.execute_sql("SET LOCAL plan_cache_mode = force_custom_plan")


@contextmanager
def reading(db: Database) -> Iterator[None]:
    """Read, with plans made anew. On SQLite outside a transaction, which would be the writer's."""
    with connected(db):
        if not is_postgres(db):
            yield
            return
        with db.atomic():
            plan_anew(db)
            yield
