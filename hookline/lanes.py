"""What waits, and who is told: the lanes that open, and the waking of workers, after a commit.

A lane may be due early, never late: who looks finds nothing, and moves it on. A worker that nobody woke polls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from peewee import Database

from hookline import clock, policy
from hookline.store import forks, locks, notices, sql
from hookline.store.failures import reason
from hookline.store.units import in_unit, transaction
from hookline.tables import IN_ORDER, read_time, stored_time

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


BROUGHT_FORWARD = 250  # deliveries that a change of their webhook makes due at once, so that no writer is held up


def open_now(db: Database, webhook_id: str) -> None:
    """Open the lane of this webhook, unless a delivery is being made in order: then its settlement does so."""
    change_lanes(db, lambda: _open(db, webhook_id, lambda opens, failures, now: (now, failures)))


def reopen(db: Database, webhook_id: str, before: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Let a webhook's lane no longer wait for what these changes remove, in their unit of work.

    `before`: the webhook as the manager shows it. With another endpoint, or enabled again, it has not failed yet; what
    waits for its next attempt, but for at most BROUGHT_FORWARD of them, goes on doing so.
    """
    after = {**before, **changes}
    is_new = after["url"] != before["url"] or "headers" in changes or (after["enabled"] and not before["enabled"])

    def step() -> None:
        if is_new:
            _bring_forward(db, webhook_id)
        _open(db, webhook_id, afresh if is_new else anew)

    def afresh(opens: datetime, failures: int, now: datetime) -> tuple[datetime, int]:
        return now, 0

    def anew(opens: datetime, failures: int, now: datetime) -> tuple[datetime, int]:
        rest = policy.rest_after((opens - now).total_seconds(), failures, before, after)
        return now + timedelta(seconds=rest), failures

    if is_new or any(after[name] != before[name] for name in ("rate_limit", "ordered", "retry_schedule")):
        change_lanes(db, step)


def _bring_forward(db: Database, webhook_id: str) -> None:
    statement = f"""
        UPDATE deliveries SET next_attempt_at = {sql.moment(db)} WHERE delivery_id IN (
            SELECT delivery_id FROM deliveries
            WHERE webhook_id = {db.param} AND status = 'pending' AND next_attempt_at > {sql.moment(db)} AND NOT leased
            ORDER BY next_attempt_at LIMIT {BROUGHT_FORWARD}{locks.skip_locked(db, "deliveries")})"""
    now = stored_time(clock.now())
    db.execute_sql(statement, (now, webhook_id, now))


def _open(db: Database, webhook_id: str, wanted: Callable[[datetime, int, datetime], tuple[datetime, int]]) -> None:
    """Open a lane at the time, and with the failures, that `wanted` makes of when it opens, its failures and now."""
    now = clock.now()
    look = f"SELECT open_at, failures FROM lanes WHERE webhook_id = {db.param}{locks.for_update(db, 'lanes')}"
    lane = db.execute_sql(look, (webhook_id,)).fetchone()
    made = f"SELECT 1 FROM lanes WHERE webhook_id = {db.param} AND EXISTS {MADE_IN_ORDER}"
    if lane is None or db.execute_sql(made, (webhook_id,)).fetchone():  # which looks again, once we hold the lane
        return
    opens, failures = wanted(max(read_time(lane[0]) or now, now), lane[1], now)
    change = f"UPDATE lanes SET due_at = {sql.moment(db)}, open_at = {sql.moment(db)}, failures = {db.param}"
    values = (stored_time(opens), None if opens <= now else stored_time(opens), failures, webhook_id)
    db.execute_sql(f"{change} WHERE webhook_id = {db.param}", values)
