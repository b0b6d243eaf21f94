"""The log of attempts: each request that was sent is one of its rows, with its own answer.

A delivery has its latest attempt inline; those before it are rows of `attempts`. Results come as rows of RESULT.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from peewee import Database

from hookline.store import sql

RESULT = (
    "id bigint",
    "attempts_made integer",
    "outcome",
    "due timestamptz",
    "ended timestamptz",
    "started timestamptz",
    "duration integer",
    "code integer",
    "problem",
    "answer",
)
IS_RECORDED = (  # an attempt is known by when it started: a commit whose answer was lost is made again
    "(coalesce(d.last_started_at = given.started, FALSE) OR EXISTS (SELECT 1 FROM attempts a "
    "WHERE a.delivery_id = d.delivery_id AND a.started_at = given.started))"
)

Row = tuple[Any, ...]  # of RESULT


class Recorded(NamedTuple):
    """Where a delivery is after its attempt was recorded. `is_new`: now, and not the first time that it was settled."""

    status: str
    is_new: bool


def record(db: Database, rows: Sequence[Row]) -> dict[int, Recorded]:
    """Record these attempts, at most one of each delivery, and what follows for their deliveries, by id.

    What was deleted meanwhile is left out.
    """
    given = (sql.parameter(rows),)
    if any(attempts_made for _, attempts_made, *_ in rows):
        db.execute_sql(keep_sql(db, "d.attempts = given.attempts_made AND d.status IN ('pending', 'cancelled')"), given)
    found = {row[0]: Recorded(row[1], True) for row in db.execute_sql(settle_sql(db), given).fetchall()}
    if left := [row for row in rows if row[0] not in found]:
        found |= _record_late(db, left)
    return found


def _record_late(db: Database, rows: Sequence[Row]) -> dict[int, Recorded]:
    """Record attempts during which another one of the same delivery was recorded, unless they were themselves."""
    given = (sql.parameter(rows),)
    db.execute_sql(keep_sql(db, f"NOT {IS_RECORDED}"), given)
    late = db.execute_sql(late_sql(db), given).fetchall()
    ids = f"(SELECT id FROM {sql.rows(db, 'id bigint')})"
    select = f"SELECT delivery_id, status FROM deliveries WHERE delivery_id IN {ids}"
    known = db.execute_sql(select, (sql.ids(row[0] for row in rows),)).fetchall()
    return {row[0]: Recorded(row[1], False) for row in known} | {row[0]: Recorded(row[1], True) for row in late}


@lru_cache(maxsize=8)
def keep_sql(db: Database, condition: str) -> str:
    """Copies the latest attempt of each delivery that gets another one."""
    columns = ("started_at", "duration_ms", "status_code", "error", "response")
    return f"""
        INSERT INTO attempts (delivery_id, number, {", ".join(columns)})
        SELECT d.delivery_id, d.attempts, {", ".join(f"d.last_{name}" for name in columns)}
        FROM {sql.rows(db, *RESULT)} CROSS JOIN deliveries d
        WHERE d.delivery_id = given.id AND {condition} AND d.last_started_at IS NOT NULL
        ON CONFLICT (delivery_id, number) DO NOTHING"""


@lru_cache(maxsize=8)
def settle_sql(db: Database) -> str:
    """Leaves `pending`, or `cancelled` where the attempt that was under way did arrive."""
    applies = "(status = 'pending' OR given.outcome = 'succeeded')"
    return f"""
        UPDATE deliveries SET {_changes(applies)}
        FROM {sql.rows(db, *RESULT)}
        WHERE delivery_id = given.id AND attempts = given.attempts_made AND status IN ('pending', 'cancelled')
        RETURNING delivery_id, status"""


@lru_cache(maxsize=8)
def late_sql(db: Database) -> str:
    """One that arrived has arrived; a failure moves the delivery only while that is leased, but is written down."""
    applies = "(status = 'pending' AND leased OR status <> 'succeeded' AND given.outcome = 'succeeded')"
    return f"""
        UPDATE deliveries AS d SET {_changes(applies)}
        FROM {sql.rows(db, *RESULT)}
        WHERE d.delivery_id = given.id AND NOT {IS_RECORDED}
        RETURNING delivery_id, status"""


def _changes(applies: str) -> str:
    return f"""
        status = CASE WHEN {applies} THEN given.outcome ELSE status END, leased = leased AND NOT {applies},
        next_attempt_at = CASE WHEN {applies} THEN given.due ELSE next_attempt_at END,
        finished_at = CASE WHEN {applies} THEN given.ended ELSE finished_at END,
        reason = CASE WHEN {applies} THEN NULL ELSE reason END,
        attempts = attempts + 1, last_started_at = given.started, last_duration_ms = given.duration,
        last_status_code = given.code, last_error = given.problem, last_response = given.answer"""
