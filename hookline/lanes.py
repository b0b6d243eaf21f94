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

from hookline import clock
from hookline.store import forks, notices, sql
from hookline.store.failures import reason
from hookline.store.units import in_unit, transaction
from models import IN_ORDER, stored_time

log = logging.getLogger("hookline")

OF_WEBHOOKS = (  # one seek for each: it may have any number that wait
    "FROM (SELECT id AS webhook_id FROM {given}) AS w WHERE (SELECT d.next_attempt_at FROM deliveries d "
    "WHERE d.webhook_id = w.webhook_id AND d.status = 'pending' ORDER BY d.next_attempt_at LIMIT 1) IS NOT NULL"
)
OF_EVENTS = "FROM deliveries WHERE event_id IN (SELECT id FROM {given}) AND NOT leased"
MADE_IN_ORDER = (  # of the lane: a delivery that keeps strict order, and that somebody is making
    "(SELECT 1 FROM deliveries d WHERE d.webhook_id = lanes.webhook_id AND d.status = 'pending' "
    f"AND d.next_attempt_at = '{IN_ORDER}' AND d.leased)"
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


def queue(db: Database, which: str, ids: str, *, open_now: bool = False) -> None:
    """Make lanes due, but none before it opens: `OF_WEBHOOKS` of these ids for which something waits, or `OF_EVENTS`.

    With `open_now` a lane that rests is opened.
    """
    change_lanes(db, lambda: open_lanes(db, which, ids, open_now=open_now))


def open_lanes(db: Database, which: str, ids: str, *, open_now: bool = False) -> None:
    moment = sql.moment(db)
    due = sql.later(db, "lanes.open_at", sql.sooner(db, "lanes.due_at", "excluded.due_at"))
    change = f"due_at = {due}"
    if open_now:  # but not of strict order while a delivery is being made: the closed lane is its lease
        change = (
            "due_at = excluded.due_at, open_at = NULL "
            f"WHERE NOT coalesce(lanes.open_at > excluded.due_at, FALSE) OR NOT EXISTS {MADE_IN_ORDER}"
        )
    statement = (
        f"INSERT INTO lanes (webhook_id, due_at, failures) SELECT DISTINCT webhook_id, {moment}, 0 "
        f"{which.format(given=sql.rows(db, 'id'))} ORDER BY webhook_id ON CONFLICT (webhook_id) DO UPDATE SET {change}"
    )
    db.execute_sql(statement, (stored_time(clock.now()), ids))


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
