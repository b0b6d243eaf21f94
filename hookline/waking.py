"""What waits, and who is told: the lanes that open, and the waking of workers, after a commit.

A lane may be due early, never late: who looks finds nothing, and moves it on. A worker that nobody woke polls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from peewee import Database

from hookline import clock, forks, notices, sql
from hookline.database import in_unit, transaction
from hookline.failures import reason
from models import IN_ORDER, stored_time

log = logging.getLogger("hookline")

MADE_IN_ORDER = (  # of the lane: a delivery that keeps strict order, and that somebody is making
    "(SELECT 1 FROM deliveries d WHERE d.webhook_id = lanes.webhook_id AND d.status = 'pending' "
    f"AND d.next_attempt_at = '{IN_ORDER}' AND d.leased)"
)

OF_WEBHOOKS = (  # the next one of each: any number may wait, and the writer must not read them all
    "delivery_id IN (SELECT (SELECT d.delivery_id FROM deliveries d "
    "WHERE d.webhook_id = given.id AND d.status = 'pending' ORDER BY d.next_attempt_at LIMIT 1) FROM {given})"
)


class Slots(NamedTuple):
    """What the worker of this process can take now: so many in all; of one webhook its share, less what it has."""

    free: int = 0
    share: int = 0
    held: Mapping[str, int] = {}


Leased = tuple[int, str]  # delivery_id, webhook_id


class Wake(NamedTuple):
    """What a commit has left to do: leases that this process has from `since` (of time.monotonic()) until then.

    Without leases: something is due in a lane, for any worker.
    """

    leased: Sequence[Leased] = ()
    until: str = ""
    since: float = 0


@dataclass
class Outlet:
    """How publishing reaches the worker of this process, and what it may take. Set at assembly."""

    max_payload: int = 256 * 1024  # bytes
    lease: float = 60  # seconds
    slots: Callable[[], Slots] = Slots
    wake: Callable[[Wake], None] = lambda wake: None


_outlets: WeakKeyDictionary[Database, Outlet] = WeakKeyDictionary()


def attach(db: Database, outlet: Outlet) -> None:
    """From now on publishing on this database goes through this outlet."""
    _outlets[db] = outlet


def outlet_of(db: Database) -> Outlet:
    return _outlets.get(db) or Outlet(wake=lambda wake: notices.send(db))


@forks.in_child
def _detach() -> None:
    """The worker of a parent is not in its child: what a child publishes waits in its lane, for any worker."""
    for db, outlet in list(_outlets.items()):
        _outlets[db] = Outlet(outlet.max_payload, outlet.lease, wake=lambda wake, db=db: notices.send(db))  # type: ignore[misc]


def queue(db: Database, condition: str, *parameters: Any, open_now: bool = False) -> None:
    """Make the lanes due of the webhooks whose deliveries meet the condition, but no lane before it opens.

    `{given}` in the condition is a FROM item with a column `id`, of the ids in its parameter (`{numbers}`: of those
    that are numbers). With `open_now` a lane that rests is opened.
    """
    change_lanes(db, lambda: open_lanes(db, condition, *parameters, open_now=open_now))


def open_lanes(db: Database, condition: str, *parameters: Any, open_now: bool = False) -> None:
    moment = sql.moment(db)
    due = sql.later(db, "lanes.open_at", sql.sooner(db, "lanes.due_at", "excluded.due_at"))
    change = f"due_at = {due}"
    if open_now:  # but not of strict order while a delivery is being made: the closed lane is its lease
        change = (
            "due_at = excluded.due_at, open_at = NULL "
            f"WHERE NOT coalesce(lanes.open_at > excluded.due_at, FALSE) OR NOT EXISTS {MADE_IN_ORDER}"
        )
    where = condition.format(given=sql.rows(db, "id"), numbers=sql.rows(db, "id bigint"))
    statement = (
        f"INSERT INTO lanes (webhook_id, due_at, failures) SELECT DISTINCT webhook_id, {moment}, 0 FROM deliveries "
        f"WHERE {where} ORDER BY webhook_id ON CONFLICT (webhook_id) DO UPDATE SET {change}"
    )
    db.execute_sql(statement, (stored_time(clock.now()), *parameters))


def change_lanes(db: Database, step: Callable[[], Any]) -> None:
    """Run a step that may open lanes, in this unit of work, and wake the worker after its commit."""

    def wake() -> None:
        outlet_of(db).wake(Wake())

    def in_its_own() -> None:
        with transaction(db):
            step()

    if in_unit(db):
        step()
        after_commit(db, wake)
    else:  # the caller's own transaction: until it ends it would hold lanes that workers and other publishers need
        after_commit(db, in_its_own, wake)


def after_commit(db: Database, *steps: Callable[[], None]) -> None:
    """What follows once it is committed. If it fails the sweep finds what waits, so nobody is told."""

    def follow() -> None:
        try:
            for step in steps:
                step()
        except Exception as exc:
            log.warning("deliveries wait for the sweep: %s", reason(exc))

    db.after_commit(follow)
