"""SQL as text: the one way to write it, and the fragments in which the databases differ.

Peewee builds statements where time does not matter. On a hot path a statement is text, since building it costs ten
times what running it does, and one statement serves a whole set of rows, since each statement costs a hand-over of the
GIL. Such a statement is written like this:

    @lru_cache(maxsize=8)  # per database: its text never changes
    def _lease_sql(db: Database) -> str:
        lease_end, due = sql.time(db, "lease_end"), sql.values(db, "due", "id bigint")
        return f"UPDATE deliveries SET next_attempt_at = {lease_end} FROM {due} WHERE delivery_id = due.id"

    db.execute_sql(_lease_sql(db), {"lease_end": stored_time(lease_end), "due": sql.encoded_ids(delivery_ids)})

Every value is a parameter with a name, and a value that is used twice is one parameter. Rows come as one JSON parameter
whose name is the alias of the FROM item. Only our own constants are put into the text. In the text of a statement with
parameters PostgreSQL's driver wants a percent sign doubled.
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
    """The parameter of this name. Run the statement with a mapping of names to values."""
    return f"%({name})s" if is_postgres(db) else f":{name}"


def time(db: Database, name: str) -> str:
    """The parameter of this name, whose value is a time as `stored_time` writes it."""
    return f"%({name})s::timestamptz" if is_postgres(db) else f":{name}"


def values(db: Database, name: str, *columns: str) -> str:
    """The FROM item `name` with these columns; its rows are the parameter of the same name, `encoded`.

    A column is a name, followed by a space and its type unless that is text: `"id bigint"`.
    """
    names = [column.partition(" ")[0] for column in columns]
    if is_postgres(db):
        types = [column.partition(" ")[2] or "text" for column in columns]
        fields = [f"(value ->> {index})::{kind} AS {names[index]}" for index, kind in enumerate(types)]
        return f"(SELECT {', '.join(fields)} FROM json_array_elements({param(db, name)}::json)) AS {name}"
    fields = [f"json_extract(value, '$[{index}]') AS {column}" for index, column in enumerate(names)]
    return f"(SELECT {', '.join(fields)} FROM json_each({param(db, name)})) AS {name}"


def each(db: Database, source: str, tables: str, columns: str, condition: str, *, alias: str) -> str:
    """FROM and WHERE that join the rows of `source` (see `values`) with `tables`, by one seek for each row.

    Outside the columns are `alias.*`. PostgreSQL estimates that `source` has a hundred rows, and might read whole
    tables rather than seek so often: LATERAL and OFFSET 0 make it plan for a single row.
    """
    if is_postgres(db):
        return (
            f"FROM {source} CROSS JOIN LATERAL (SELECT {columns} FROM {tables} WHERE {condition} OFFSET 0) AS {alias}"
        )
    return f"FROM {source} CROSS JOIN {tables} WHERE {condition}"


def encoded(rows: Iterable[Sequence[Any]]) -> str:
    """Rows of numbers, strings, booleans and nulls, as the parameter that `values` reads."""
    return json.dumps(list(rows), ensure_ascii=False, separators=(",", ":"))


def encoded_ids(ids: Iterable[Any]) -> str:
    """Ids, as the parameter that `values` with a single column reads."""
    return encoded([row_id] for row_id in ids)


def seconds(db: Database, start: str, end: str) -> str:
    """The seconds from one time to another."""
    if is_postgres(db):
        return f"extract(epoch FROM {end} - {start})"
    return f"(julianday({end}) - julianday({start})) * 86400.0"


def later(db: Database, first: str, second: str) -> str:
    """The greater of two values, or the second if the first is null."""
    return f"greatest({first}, {second})" if is_postgres(db) else f"max(coalesce({first}, {second}), {second})"


def sooner(db: Database, first: str, second: str) -> str:
    """The smaller of two values, neither of them null."""
    return f"least({first}, {second})" if is_postgres(db) else f"min({first}, {second})"


def plan_anew(db: Database) -> None:
    """Plan every statement of this transaction for the tables as they are now. PostgreSQL only.

    PostgreSQL keeps the plan of a repeated statement. A plan made while a table was nearly empty reads all of it for
    each row that it looks up, until the table is analyzed.
    """
    if is_postgres(db):
        db.execute_sql("SET LOCAL plan_cache_mode = force_custom_plan")


@contextmanager
def reading(db: Database) -> Iterator[None]:
    """Read with new plans. There is no transaction on SQLite, where it would take the writer's lock."""
    with connected(db):
        if not is_postgres(db):
            yield
            return
        with db.atomic():
            plan_anew(db)
            yield
