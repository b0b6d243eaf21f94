"""Lanes: the queue of each webhook. Publishing, replays and changes of a webhook make them due; workers claim them.

A webhook has a lane row while something waits for it that is not leased; an event whose deliveries are all leased by
their publisher writes none. `due_at` may be early, never late: a worker that finds nothing due moves it on. A lane
rests until `open_at`, because its endpoint fails, has a rate limit, or gets a delivery in strict order; meanwhile
`due_at` equals `open_at`. Workers are woken after the commit; one that nobody wakes polls.

**Strict order.** A webhook that is `ordered` gets one delivery at a time, the oldest first. While it is pending, such a
delivery has the same `next_attempt_at` as all others of its webhook, IN_ORDER, a moment in 1970: so the seek by
(webhook_id, next_attempt_at) finds them in the order of their ids, and a retry stays before what was published after
it. The true time is in the lane: it rests until the next attempt, and while a delivery is being made it is closed until
the lease ends. `next_attempt_at`, `next_attempt_sql`, `is_in_order` and `in_order_sql` are the only places that know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from peewee import Database

from hookline import clock, policy
from hookline.store import forks, locks, notices, sql
from hookline.store.failures import reason
from hookline.store.pool import is_postgres
from hookline.store.units import in_unit, transaction
from hookline.tables import IN_ORDER, read_time, stored_time

log = logging.getLogger("hookline")

MAX_PAYLOAD = 256 * 1024  # bytes, where nothing is attached that says otherwise
BROUGHT_FORWARD = 250  # deliveries that a change of their webhook makes due at once, so that no writer is held up
ORDERED_TIME = datetime.fromisoformat(IN_ORDER).astimezone(UTC)


def next_attempt_at(ordered: bool | None, due: str) -> str:
    """The `next_attempt_at` of a pending delivery that is due at this stored time."""
    return IN_ORDER if ordered else due


def next_attempt_sql(ordered: str, due: str) -> str:
    """`next_attempt_at` as SQL, of SQL expressions: whether the webhook is ordered, and when the delivery is due."""
    return f"CASE WHEN {ordered} THEN '{IN_ORDER}' ELSE {due} END"


def is_in_order(next_attempt: datetime | None) -> bool:
    """Does a delivery with this `next_attempt_at` keep strict order?"""
    return next_attempt == ORDERED_TIME


def in_order_sql(delivery: str) -> str:
    """`is_in_order` as SQL, of the delivery with this alias."""
    return f"{delivery}.next_attempt_at = '{IN_ORDER}'"


def making_in_order_sql(lane: str) -> str:
    """SQL that tells whether a delivery in strict order is being made for the lane with this alias: one seek."""
    return (
        f"EXISTS (SELECT 1 FROM deliveries d WHERE d.webhook_id = {lane}.webhook_id AND d.status = 'pending' "
        f"AND {in_order_sql('d')} AND d.leased)"
    )


class Slots(NamedTuple):
    """Slots of this process's worker: `free` in all, for one webhook `per_webhook` less what is in flight."""

    free: int
    per_webhook: int
    in_flight: Mapping[str, int] = {}


NO_SLOTS = Slots(0, 0)
Leased = tuple[int, str]  # delivery_id, webhook_id


class Wake(NamedTuple):
    """News for workers after a commit: leases of this process, from `since` (of time.monotonic()) to `until`.

    Without leases: a lane is due, for any worker.
    """

    leased: Sequence[Leased] = ()
    until: str = ""
    since: float = 0


@dataclass(frozen=True)
class Outlet:
    """How publishing reaches the worker of this process, and what it may take. Set at assembly."""

    max_payload: int  # bytes
    lease: float  # seconds
    slots: Callable[[], Slots]
    wake: Callable[[Wake], None]


_outlets: WeakKeyDictionary[Database, Outlet] = WeakKeyDictionary()


def attach(db: Database, outlet: Outlet) -> None:
    """Let publishing on this database go through this outlet from now on."""
    _outlets[db] = outlet


def outlet_without_worker(max_payload: int, notify: Callable[[], None]) -> Outlet:
    """An outlet that leases nothing: what is published waits in its lane, and `notify` wakes workers elsewhere."""
    return Outlet(max_payload, 0, lambda: NO_SLOTS, lambda wake: notify())


def outlet_of(db: Database) -> Outlet:
    """The outlet that is attached, or one without a worker."""
    return _outlets.get(db) or outlet_without_worker(MAX_PAYLOAD, lambda: notices.send(db))


@forks.in_child
def _detach() -> None:
    """Replace the outlets in the child of a fork, which does not have its parent's worker."""
    for db, outlet in list(_outlets.items()):
        _outlets[db] = outlet_without_worker(outlet.max_payload, lambda db=db: notices.send(db))  # type: ignore[misc]


_unopened: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # webhooks, by Peewee's object of the transaction


def open_lanes(db: Database, webhook_ids: Iterable[str], *, now: bool = False) -> None:
    """Make the lanes of these webhooks due, where anything waits; with `now` those that rest, too. Wakes workers.

    In a caller's own transaction this happens after its commit, at once for all that it has published: until it ends
    it would hold lanes that workers and other publishers need.
    """
    if now or in_unit(db):
        _change_lanes(db, lambda: make_due(db, webhook_ids, now=now))
        return
    unopened = _unopened.setdefault(db.top_transaction(), set())
    unopened.update(webhook_ids)

    def open_all() -> None:
        if unopened:
            webhook_ids = list(unopened)
            unopened.clear()
            with transaction(db):
                make_due(db, webhook_ids)
            outlet_of(db).wake(Wake())

    after_commit(db, open_all)  # each time: the first may be in a savepoint that is rolled back


def make_due(db: Database, webhook_ids: Iterable[str], *, now: bool = False) -> int:
    """Make the lanes of these webhooks due, where anything waits, unless they are or rest; returns of how many.

    With `now` those that rest are opened, too, unless a delivery is being made in order. Inside a unit of work; wakes
    nobody.
    """
    values = {"now": stored_time(clock.now()), "webhook_ids": sql.encoded_ids(set(webhook_ids))}
    if now and is_postgres(db):  # locks the lanes, so that the next statement sees what was leased meanwhile
        db.execute_sql(_make_due_sql(db), values)
    return len(db.execute_sql(_open_all_sql(db) if now else _make_due_sql(db), values).fetchall())


@lru_cache(maxsize=8)
def _make_due_sql(db: Database) -> str:
    return f"""{_insert_lanes_sql(db)}
        ON CONFLICT (webhook_id) DO UPDATE SET due_at = excluded.due_at
        WHERE lanes.due_at > excluded.due_at AND NOT coalesce(lanes.open_at > excluded.due_at, FALSE)
        RETURNING webhook_id"""


@lru_cache(maxsize=8)
def _open_all_sql(db: Database) -> str:
    return f"""{_insert_lanes_sql(db)}
        ON CONFLICT (webhook_id) DO UPDATE SET due_at = excluded.due_at, open_at = NULL
        WHERE NOT coalesce(lanes.open_at > excluded.due_at, FALSE) OR NOT {making_in_order_sql("lanes")}
        RETURNING webhook_id"""


def _insert_lanes_sql(db: Database) -> str:
    """Insert lanes that are due for those webhooks for which anything waits: two seeks each, however much it is."""
    waits = """(SELECT d.next_attempt_at FROM deliveries d WHERE d.webhook_id = w.webhook_id AND d.status = 'pending'
                ORDER BY d.next_attempt_at LIMIT 1) IS NOT NULL"""
    condition = f"w.webhook_id = webhook_ids.id AND {waits}"
    webhooks = sql.each(db, sql.values(db, "webhook_ids", "id"), "webhooks w", "w.webhook_id", condition, alias="w")
    return f"""
        INSERT INTO lanes (webhook_id, due_at, failures)
        SELECT w.webhook_id, {sql.time(db, "now")}, 0 {webhooks} ORDER BY w.webhook_id"""


def open_now(db: Database, webhook_id: str) -> None:
    """Open the lane of this webhook, unless a delivery is being made in order: then its settlement does so."""
    _change_lanes(db, lambda: _change_rest(db, webhook_id, lambda lane, now: Rest(now, lane.failures)))


def reopen(db: Database, webhook_id: str, before: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Let a webhook's lane no longer wait for what these changes remove, in their unit of work.

    `before`: the webhook as the manager shows it. With another endpoint, or enabled again, it has not failed yet:
    its lane opens, and at most BROUGHT_FORWARD of the deliveries that wait for their next attempt are due.
    """
    after = {**before, **changes}
    is_new = after["url"] != before["url"] or "headers" in changes or (after["enabled"] and not before["enabled"])

    def without_failures(lane: Rest, now: datetime) -> Rest:
        return Rest(now, 0)

    def as_changed(lane: Rest, now: datetime) -> Rest:
        seconds = policy.rest_after((lane.opens - now).total_seconds(), lane.failures, before, after)
        return Rest(now + timedelta(seconds=seconds), lane.failures)

    def step() -> None:
        if is_new:
            _bring_forward(db, webhook_id)
        _change_rest(db, webhook_id, without_failures if is_new else as_changed)

    if is_new or any(after[name] != before[name] for name in ("rate_limit", "ordered", "retry_schedule")):
        _change_lanes(db, step)


def after_commit(db: Database, *steps: Callable[[], None]) -> None:
    """Run these steps once the transaction is committed. A failure is logged: the sweep finds what waits."""

    def follow() -> None:
        try:
            for step in steps:
                step()
        except Exception as exc:
            log.warning("deliveries wait for the sweep: %s", reason(exc))

    db.after_commit(follow)


def _change_lanes(db: Database, step: Callable[[], Any]) -> None:
    """Run a step that changes lanes and wake workers: in this unit of work, or after the commit of a caller's own."""

    def wake() -> None:
        outlet_of(db).wake(Wake())

    def in_a_unit() -> None:
        with transaction(db):
            step()

    if in_unit(db):
        step()
        after_commit(db, wake)
    else:
        after_commit(db, in_a_unit, wake)


def _bring_forward(db: Database, webhook_id: str) -> None:
    """Make the deliveries of a webhook due that wait for their next attempt, BROUGHT_FORWARD at most."""
    statement = f"""
        UPDATE deliveries SET next_attempt_at = {sql.time(db, "now")} WHERE delivery_id IN (
            SELECT delivery_id FROM deliveries
            WHERE webhook_id = {sql.param(db, "webhook_id")} AND status = 'pending'
                  AND next_attempt_at > {sql.time(db, "now")} AND NOT leased
            ORDER BY next_attempt_at LIMIT {BROUGHT_FORWARD}{locks.skip_locked(db, "deliveries")})"""
    db.execute_sql(statement, {"now": stored_time(clock.now()), "webhook_id": webhook_id})


class Rest(NamedTuple):
    """When a lane opens, and after how many failures in a row."""

    opens: datetime
    failures: int


def _change_rest(db: Database, webhook_id: str, change: Callable[[Rest, datetime], Rest]) -> None:
    """Set the rest of a lane, unless a delivery is being made in order. `change` gets the rest so far, and now."""
    now = clock.now()
    this = f"webhook_id = {sql.param(db, 'webhook_id')}"
    lock = f"SELECT open_at, failures FROM lanes WHERE {this}{locks.for_update(db, 'lanes')}"
    making = f"SELECT 1 FROM lanes WHERE {this} AND {making_in_order_sql('lanes')}"
    row = db.execute_sql(lock, {"webhook_id": webhook_id}).fetchone()
    # A statement of its own, so that it sees what was leased while the lock was waited for.
    if row is None or db.execute_sql(making, {"webhook_id": webhook_id}).fetchone():
        return
    rest = change(Rest(max(read_time(row[0]) or now, now), row[1]), now)
    update = f"""
        UPDATE lanes SET due_at = {sql.time(db, "due")}, open_at = {sql.time(db, "opens")},
               failures = {sql.param(db, "failures")}
        WHERE {this}"""
    values = {
        "due": stored_time(rest.opens),
        "opens": None if rest.opens <= now else stored_time(rest.opens),
        "failures": rest.failures,
        "webhook_id": webhook_id,
    }
    db.execute_sql(update, values)
