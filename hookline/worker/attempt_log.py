"""The log of attempts: each request that was sent is one row of it, with its own answer.

A delivery has its latest attempt inline; those before it are rows of `attempts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from peewee import Database

from hookline.store import sql

COLUMNS = (  # of Attempted
    "delivery_id bigint",
    "attempts_made integer",
    "status",
    "next_attempt_at timestamptz",
    "finished_at timestamptz",
    "started_at timestamptz",
    "duration_ms integer",
    "status_code integer",
    "error",
    "response",
)
IS_RECORDED = (  # an attempt is known by when it started: a commit whose answer was lost is made again
    "(coalesce(deliveries.last_started_at = attempted.started_at, FALSE) OR EXISTS (SELECT 1 FROM attempts a "
    "WHERE a.delivery_id = deliveries.delivery_id AND a.started_at = attempted.started_at))"
)


class Attempted(NamedTuple):
    """An attempt, and where it leaves its delivery. Times are stored times."""

    delivery_id: int
    attempts_made: int  # before this one
    status: str
    next_attempt_at: str | None
    finished_at: str | None
    started_at: str
    duration_ms: int
    status_code: int | None
    error: str | None
    response: str | None


class Recorded(NamedTuple):
    """The status of a delivery after its attempt was recorded. `is_new`: now, for the first time."""

    status: str
    is_new: bool


def record(db: Database, attempted: Sequence[Attempted]) -> dict[int, Recorded]:
    """Record these attempts, at most one of each delivery, and what follows for their deliveries; by delivery_id.

    Deliveries that were deleted meanwhile are left out.
    """
    values = {"attempted": sql.encoded(attempted)}
    if any(attempt.attempts_made for attempt in attempted):
        is_next = "deliveries.attempts = attempted.attempts_made AND deliveries.status IN ('pending', 'cancelled')"
        db.execute_sql(keep_sql(db, is_next), values)
    rows = db.execute_sql(settle_sql(db), values).fetchall()
    recorded = {delivery_id: Recorded(status, is_new=True) for delivery_id, status in rows}
    if others := [attempt for attempt in attempted if attempt.delivery_id not in recorded]:
        recorded |= _record_late(db, others)
    return recorded


def _record_late(db: Database, attempted: Sequence[Attempted]) -> dict[int, Recorded]:
    """Record attempts during which another one of the same delivery was recorded, unless they are in the log."""
    values = {"attempted": sql.encoded(attempted)}
    db.execute_sql(keep_sql(db, f"NOT {IS_RECORDED}"), values)
    late = db.execute_sql(late_sql(db), values).fetchall()
    ids = f"(SELECT id FROM {sql.values(db, 'ids', 'id bigint')})"
    select = f"SELECT delivery_id, status FROM deliveries WHERE delivery_id IN {ids}"
    all_rows = db.execute_sql(select, {"ids": sql.encoded_ids(attempt.delivery_id for attempt in attempted)}).fetchall()
    recorded = {delivery_id: Recorded(status, is_new=False) for delivery_id, status in all_rows}
    return recorded | {delivery_id: Recorded(status, is_new=True) for delivery_id, status in late}


@lru_cache(maxsize=8)
def keep_sql(db: Database, condition: str) -> str:
    """Copies the latest attempt of each delivery that gets another one."""
    columns = ("started_at", "duration_ms", "status_code", "error", "response")
    return f"""
        INSERT INTO attempts (delivery_id, number, {", ".join(columns)})
        SELECT deliveries.delivery_id, deliveries.attempts, {", ".join(f"deliveries.last_{name}" for name in columns)}
        FROM {sql.values(db, "attempted", *COLUMNS)} CROSS JOIN deliveries
        WHERE deliveries.delivery_id = attempted.delivery_id AND {condition} AND deliveries.last_started_at IS NOT NULL
        ON CONFLICT (delivery_id, number) DO NOTHING"""


@lru_cache(maxsize=8)
def settle_sql(db: Database) -> str:
    """Leaves `pending`, or `cancelled` where the attempt that was under way did arrive."""
    applies = "(deliveries.status = 'pending' OR attempted.status = 'succeeded')"
    return f"""
        UPDATE deliveries SET {_changes(applies)}
        FROM {sql.values(db, "attempted", *COLUMNS)}
        WHERE deliveries.delivery_id = attempted.delivery_id AND deliveries.attempts = attempted.attempts_made
              AND deliveries.status IN ('pending', 'cancelled')
        RETURNING deliveries.delivery_id, deliveries.status"""


@lru_cache(maxsize=8)
def late_sql(db: Database) -> str:
    """A success makes its delivery succeed; a failure moves it only while it is leased. Both are in the log."""
    applies = (
        "(deliveries.status = 'pending' AND deliveries.leased "
        "OR deliveries.status <> 'succeeded' AND attempted.status = 'succeeded')"
    )
    return f"""
        UPDATE deliveries SET {_changes(applies)}
        FROM {sql.values(db, "attempted", *COLUMNS)}
        WHERE deliveries.delivery_id = attempted.delivery_id AND NOT {IS_RECORDED}
        RETURNING deliveries.delivery_id, deliveries.status"""


def _changes(applies: str) -> str:
    """SET: the attempt always, and what follows for the delivery where it `applies`."""
    decided = [
        f"{name} = CASE WHEN {applies} THEN attempted.{name} ELSE deliveries.{name} END"
        for name in ("status", "next_attempt_at", "finished_at")
    ]
    latest = [
        f"last_{name} = attempted.{name}" for name in ("started_at", "duration_ms", "status_code", "error", "response")
    ]
    return ", ".join(
        [
            *decided,
            f"leased = deliveries.leased AND NOT {applies}",
            f"reason = CASE WHEN {applies} THEN NULL ELSE deliveries.reason END",
            "attempts = deliveries.attempts + 1",
            *latest,
        ]
    )
