"""Publishing: an event and a delivery to every matching webhook, in one transaction.

A delivery is born leased where this process has a free slot for it, and is sent right after the commit; else it waits
in its webhook's lane. Only committed rows are ever sent: what wakes the worker are ids, which it reads again.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from peewee import Database
from uuid_utils import uuid7

from hookline import clock, lanes, tables
from hookline.errors import Conflict, Invalid, TooLarge, Unavailable
from hookline.lanes import Outlet, Slots, Wake
from hookline.payloads import is_same_json, payload_of
from hookline.registration import text_problem
from hookline.store import sql
from hookline.store.open import adopt
from hookline.store.units import transaction
from hookline.tables import read_time, stored_time

log = logging.getLogger("hookline")

EVENT_TYPE = re.compile(r"[!-~]([ -~]{0,198}[!-~])?")
TEAM_FIELDS = ("home_team", "away_team", "team")
MAX_KEY = 255  # characters of an idempotency key
TIGHT = 50  # webhooks that are near their share: what the others get too many is given back when it takes its slots
OWN = "hookline."  # what the types of our own events begin with: nobody else publishes them, and `*` is not for them
TEST_EVENT = f"{OWN}webhook.test"
TEST_ID = "evt_test_"  # how the id of an event for one webhook alone begins: nobody else has missed it
TEST_DATA = {"message": "A test event: it was asked for by hand, and means nothing."}


class Uncommitted:
    """What one transaction has published so far."""

    def __init__(self) -> None:
        self.leased: Counter[str] = Counter()  # of each webhook


_uncommitted: WeakKeyDictionary[Any, Uncommitted] = WeakKeyDictionary()  # by Peewee's object of the transaction


class NewEvent(NamedTuple):
    """What publishing takes. `only`: for this webhook, whatever it has subscribed to. `own`: Hookline's own event."""

    event_type: str
    data: Mapping[str, Any]
    idempotency_key: str | None = None
    only: str | None = None
    own: bool = False


class Published(NamedTuple):
    """What publishing gives. It may be awaited, because the replaced manager's `send_event` was a coroutine."""

    event_id: str
    event_type: str
    deliveries: int
    duplicate: bool

    def __await__(self) -> Generator[Any, None, Published]:
        return self
        yield


Wanted = tuple[int, str, str, str]  # place, event_id, event_type, team
Inserted = tuple[int, str, str, bool]  # delivery_id, webhook_id, event_id, leased


class Draft(NamedTuple):
    """A checked event."""

    event_id: str
    new: NewEvent
    payload: str


def publish(event_type: str, data: Mapping[str, Any], idempotency_key: str | None = None) -> Published:
    """Store an event and its deliveries, on the bound database.

    Inside the caller's own `with db.atomic():` the event commits or vanishes with the caller's rows. Raises Invalid,
    TooLarge, Conflict (the key was used with other content), Unavailable.
    """
    if tables.db.obj is None:
        raise Invalid("no database is bound: call hookline.connect(...) first, with its URL or your Peewee database")
    adopt(tables.db.obj)
    return publish_one(tables.db.obj, NewEvent(event_type, data, idempotency_key))


def publish_one(db: Database, new: NewEvent) -> Published:
    published = publish_all(db, [new])[0]
    if isinstance(published, Exception):
        raise published
    return published


def publish_all(db: Database, events: Sequence[NewEvent]) -> list[Published | Exception]:
    """Store these events and their deliveries; for each, in order, what was stored or why nothing of it was.

    Raises Unavailable: then nothing was stored.
    """
    now, since = clock.now(), time.monotonic()
    outlet = lanes.outlet_of(db)
    answers: list[Published | Exception | None] = []
    drafts: dict[int, Draft] = {}
    for place, new in enumerate(events):
        try:
            _check(new)
            payload = payload_of(new.event_type, new.data, clock.legacy_time(now), outlet.max_payload)
            drafts[place] = Draft(f"{'evt_' if new.only is None else TEST_ID}{uuid7()}", new, payload)
            answers.append(None)
        except (Invalid, TooLarge) as exc:
            answers.append(exc)
    with transaction(db):
        stored = _insert_events(db, list(drafts.values()), stored_time(now))
        fresh = [draft for draft in drafts.values() if draft.event_id in stored]
        counts = _fan_out(db, fresh, outlet, now, since)
        for place, draft in drafts.items():
            if draft.event_id in stored:
                count = counts[draft.event_id]
                answers[place] = Published(draft.event_id, draft.new.event_type, count, duplicate=False)
            else:
                answers[place] = _first_answer(db, draft)
    return [answer for answer in answers if answer is not None]


def _check(new: NewEvent) -> None:
    if not isinstance(new.event_type, str) or not EVENT_TYPE.fullmatch(new.event_type) or new.event_type == "*":
        raise Invalid("event_type must be 1 to 200 printable ASCII characters, and not *")
    if new.event_type.startswith(OWN) and new.only is None and not new.own:
        raise Invalid(f"event_type must not begin with {OWN}: such events are Hookline's own")
    if new.idempotency_key is not None and not _is_key(new.idempotency_key):
        raise Invalid(f"idempotency_key must be 1 to {MAX_KEY} printable ASCII characters")


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and 1 <= len(key) <= MAX_KEY and key.isprintable() and key.isascii()


def subscriptions_to(event_type: str) -> list[str]:
    """What webhooks subscribe to in order to get events of this type: the type, and `*` but for our own events."""
    return [event_type] if event_type.startswith(OWN) else [event_type, "*"]


def is_about(webhook_id: str, event_type: str, data: Mapping[str, Any]) -> bool:
    """Is this an event of our own about that webhook, which therefore does not get it?"""
    return event_type.startswith(OWN) and data.get("webhook_id") == webhook_id


def teams_of(data: Mapping[str, Any]) -> list[str]:
    """The teams that an event is about; '' stands for the webhooks of no team."""
    given = dict.fromkeys(team for name in TEAM_FIELDS if isinstance(team := data.get(name), str) and team)
    return ["", *(team for team in given if text_problem(team) is None)]  # no webhook has one that cannot be stored


def _insert_events(db: Database, drafts: Sequence[Draft], now: str) -> set[str]:
    """Store the events whose idempotency key is new; returns their ids."""
    if not drafts:
        return set()
    columns = ("event_id", "event_type", "payload", "idempotency_key")
    keyed = any(draft.new.idempotency_key is not None for draft in drafts)
    insert = (
        f"INSERT INTO events ({', '.join(columns)}, created_at) "
        f"SELECT {', '.join(columns)}, {sql.moment(db)} FROM {sql.rows(db, *columns)} WHERE TRUE"
    )
    rows = sql.parameter((event_id, new.event_type, payload, new.idempotency_key) for event_id, new, payload in drafts)
    if not keyed:
        db.execute_sql(insert, (now, rows))
        return {draft.event_id for draft in drafts}
    cursor = db.execute_sql(insert + " ON CONFLICT (idempotency_key) DO NOTHING RETURNING event_id", (now, rows))
    return {event_id for (event_id,) in cursor.fetchall()}


def _first_answer(db: Database, draft: Draft) -> Published | Exception:
    """The answer to an idempotency key that was used before: the first one again, or a conflict."""
    key = draft.new.idempotency_key
    found = "SELECT event_id, event_type, payload, created_at FROM events WHERE idempotency_key = "
    row = db.execute_sql(found + db.param, (key,)).fetchone()
    if row is None:  # purged in this very moment
        return Unavailable("the event of this idempotency key is being purged; nothing was stored, try again")
    event_id, event_type, payload, created_at = row
    again = payload_of(draft.new.event_type, draft.new.data, clock.legacy_time(read_time(created_at)), 2**31)
    if event_type != draft.new.event_type or not is_same_json(payload, again):
        return Conflict("this idempotency key was used before, with other content")
    counted = f"SELECT count(*) FROM deliveries WHERE event_id = {db.param}"
    return Published(event_id, event_type, int(db.execute_sql(counted, (event_id,)).fetchone()[0]), duplicate=True)


def _fan_out(db: Database, drafts: Sequence[Draft], outlet: Outlet, now: datetime, since: float) -> Counter[str]:
    """Insert the deliveries of new events; how many each has."""
    wanted = [
        (place, draft.event_id, event_type, team)
        for place, draft in enumerate(drafts)
        if draft.new.only is None
        for event_type in subscriptions_to(draft.new.event_type)
        for team in teams_of(draft.new.data)
    ]
    at, lost = stored_time(now), stored_time(now + timedelta(seconds=outlet.lease))
    so_far = _uncommitted.setdefault(db.top_transaction(), Uncommitted())
    slots = _less(outlet.slots(), so_far.leased)
    rows = _insert_matching(db, wanted, slots, len(drafts), at, lost) if wanted else []
    for draft in drafts:
        if draft.new.only is not None:
            rows += _insert_one(db, draft.event_id, draft.new.only, at)
    leased = [(delivery_id, webhook_id) for delivery_id, webhook_id, _, is_leased in rows if is_leased]
    if len(leased) < len(rows):
        lanes.open_lanes(db, {webhook_id for _, webhook_id, _, is_leased in rows if not is_leased})
    if leased:
        so_far.leased.update(webhook_id for _, webhook_id in leased)
        lanes.after_commit(db, so_far.leased.clear, lambda: outlet.wake(Wake(leased, lost, since)))
    return Counter(event_id for _, _, event_id, _ in rows)


def _less(slots: Slots, leased: Mapping[str, int]) -> Slots:
    """What is left of the slots for a transaction that has leased so much already."""
    if not leased:
        return slots
    return Slots(
        max(slots.free - sum(leased.values()), 0), slots.per_webhook, Counter(slots.in_flight) + Counter(leased)
    )


def _insert_matching(
    db: Database, wanted: Sequence[Wanted], slots: Slots, most: int, at: str, lost: str
) -> list[Inserted]:
    """One statement for all: a seek in `subscriptions` for each type and team, whatever its size.

    Each webhook gets `most` deliveries at most.
    """
    tight = [
        (one, max(slots.per_webhook - held, 0))
        for one, held in slots.in_flight.items()
        if held + most > slots.per_webhook
    ]
    tight = sorted(tight, key=itemgetter(1))[:TIGHT]
    moment = sql.moment(db)
    matching = sql.each(
        db,
        sql.rows(db, "place integer", "event_id", "event_type", "team"),
        "subscriptions s CROSS JOIN webhooks w",
        "w.webhook_id, w.ordered, w.rate_limit",
        "s.event_type = given.event_type AND s.team = given.team AND w.webhook_id = s.webhook_id AND w.enabled",
        alias="w",
    )
    statement = f"""
        WITH tight AS MATERIALIZED (SELECT id, room FROM {sql.rows(db, "id", "room integer")})
        INSERT INTO deliveries (webhook_id, event_id, leased, next_attempt_at, created_at)
        SELECT webhook_id, event_id, leased,
               CASE WHEN leased THEN {moment} ELSE {lanes.next_attempt_sql("in_order", moment)} END, {moment}
        FROM (
            SELECT webhook_id, event_id, place, in_order, ordinary
                   AND row_number() OVER (ORDER BY place, webhook_id) <= {db.param}
                   AND row_number() OVER (PARTITION BY webhook_id ORDER BY place) <= coalesce(room, {db.param})
                   AS leased
            FROM (
                SELECT DISTINCT given.place, given.event_id, w.webhook_id, coalesce(w.ordered, FALSE) AS in_order,
                       w.rate_limit IS NULL AND w.ordered IS NOT TRUE AND NOT coalesce(
                           (SELECT l.failures > 0 OR l.due_at <= {moment} OR coalesce(l.open_at > {moment}, FALSE)
                            FROM lanes l WHERE l.webhook_id = w.webhook_id), FALSE) AS ordinary
                {matching}
            ) AS matched LEFT JOIN tight ON tight.id = matched.webhook_id
        ) AS placed
        ORDER BY place
        RETURNING delivery_id, webhook_id, event_id, leased"""
    given = (sql.parameter(tight), lost, at, at, slots.free, slots.per_webhook, at, at, sql.parameter(wanted))
    return list(db.execute_sql(statement, given).fetchall())


def _insert_one(db: Database, event_id: str, webhook_id: str, at: str) -> list[Inserted]:
    moment = sql.moment(db)
    insert = f"""
        INSERT INTO deliveries (webhook_id, event_id, leased, next_attempt_at, created_at)
        SELECT webhook_id, {db.param}, FALSE, {lanes.next_attempt_sql("ordered", moment)}, {moment}
        FROM webhooks WHERE webhook_id = {db.param} RETURNING delivery_id, webhook_id, event_id, leased"""
    return list(db.execute_sql(insert, (event_id, at, at, webhook_id)).fetchall())
