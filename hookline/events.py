"""Publishing: an event and a delivery to every matching webhook, in one transaction.

A delivery is inserted leased where this process has a free slot for it, and is sent right after the commit; else it
waits in its webhook's lane. Only committed rows are ever sent: the worker gets ids, and reads the rows again.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from peewee import Database
from uuid_utils import uuid7

from hookline import clock, deliveries, lanes, tables
from hookline.deliveries import Inserted
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
KEY = re.compile(f"[ -~]{{1,{MAX_KEY}}}")
UNLIMITED = 2**31  # bytes
# Webhooks near their capacity that matching is told of: the worker gives back what others lease too much.
TIGHT = 50
OWN = "hookline."  # prefix of our own events' types: nobody else publishes them, and `*` does not subscribe to them
TEST_EVENT = f"{OWN}webhook.test"
TEST_ID = "evt_test_"  # prefix of the ids of events for one webhook alone, which nobody else has missed
TEST_DATA = {"message": "A test event: it was asked for by hand, and means nothing."}

# Leases by webhook that a transaction has not committed yet, by Peewee's object of the transaction.
_uncommitted: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()


class NewEvent(NamedTuple):
    """An event to publish. `only`: for this webhook, whatever it has subscribed to. `own`: Hookline's own event."""

    event_type: str
    data: Mapping[str, Any]
    idempotency_key: str | None = None
    only: str | None = None
    own: bool = False


class Published(NamedTuple):
    """A stored event. It may be awaited, because the replaced manager's `send_event` was a coroutine."""

    event_id: str
    event_type: str
    deliveries: int
    duplicate: bool

    def __await__(self) -> Generator[Any, None, Published]:
        return self
        yield


class Draft(NamedTuple):
    """A checked event."""

    event_id: str
    new: NewEvent
    payload: str


class Wanted(NamedTuple):
    """A subscription that an event is for. `position`: of the event among those that are published together."""

    position: int
    event_id: str
    event_type: str
    team: str


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
    """Like `publish_all` of one event; raises why it was not stored."""
    published = publish_all(db, [new])[0]
    if isinstance(published, Exception):
        raise published
    return published


def publish_all(db: Database, events: Sequence[NewEvent]) -> list[Published | Exception]:
    """Store these events and their deliveries; returns for each, in order, what was stored or why it was not.

    Raises Unavailable: then nothing was stored.
    """
    now, since = clock.now(), time.monotonic()
    outlet = lanes.outlet_of(db)
    answers: dict[int, Published | Exception] = {}
    drafts: dict[int, Draft] = {}
    for position, new in enumerate(events):
        try:
            drafts[position] = _draft(new, now, outlet.max_payload)
        except (Invalid, TooLarge) as exc:
            answers[position] = exc
    with transaction(db):
        stored = _insert_events(db, list(drafts.values()), stored_time(now))
        fresh = [draft for draft in drafts.values() if draft.event_id in stored]
        counts = _fan_out(db, fresh, outlet, now, since)
        for position, draft in drafts.items():
            if draft.event_id in stored:
                count = counts[draft.event_id]
                answers[position] = Published(draft.event_id, draft.new.event_type, count, duplicate=False)
            else:
                answers[position] = _first_answer(db, draft)
    return [answers[position] for position in range(len(events))]


def _draft(new: NewEvent, now: datetime, max_payload: int) -> Draft:
    """Check an event and give it an id. Raises Invalid, TooLarge."""
    _check(new)
    payload = payload_of(new.event_type, new.data, clock.legacy_time(now), max_payload)
    return Draft(f"{'evt_' if new.only is None else TEST_ID}{uuid7()}", new, payload)


def _check(new: NewEvent) -> None:
    if not isinstance(new.event_type, str) or not EVENT_TYPE.fullmatch(new.event_type) or new.event_type == "*":
        raise Invalid("event_type must be 1 to 200 printable ASCII characters, and not *")
    if new.event_type.startswith(OWN) and new.only is None and not new.own:
        raise Invalid(f"event_type must not begin with {OWN}: such events are Hookline's own")
    key = new.idempotency_key
    if key is not None and not (isinstance(key, str) and KEY.fullmatch(key)):
        raise Invalid(f"idempotency_key must be 1 to {MAX_KEY} printable ASCII characters")


def subscriptions_to(event_type: str) -> list[str]:
    """The subscriptions that match events of this type: the type itself, and `*`, but not to our own events."""
    return [event_type] if event_type.startswith(OWN) else [event_type, "*"]


def is_about(webhook_id: str, event_type: str, data: Mapping[str, Any]) -> bool:
    """Is this an event of our own about that webhook, which therefore does not get it?"""
    return event_type.startswith(OWN) and data.get("webhook_id") == webhook_id


def teams_of(data: Mapping[str, Any]) -> list[str]:
    """The teams that an event is about; '' stands for the webhooks of no team."""
    teams = dict.fromkeys(team for name in TEAM_FIELDS if isinstance(team := data.get(name), str) and team)
    return ["", *(team for team in teams if text_problem(team) is None)]  # no webhook has one that cannot be stored


def _insert_events(db: Database, drafts: Sequence[Draft], now: str) -> set[str]:
    """Store the events whose idempotency key is new; returns their ids."""
    if not drafts:
        return set()
    rows = sql.encoded(
        (draft.event_id, draft.new.event_type, draft.payload, draft.new.idempotency_key) for draft in drafts
    )
    values = {"now": now, "drafts": rows}
    if all(draft.new.idempotency_key is None for draft in drafts):
        db.execute_sql(_insert_events_sql(db), values)
        return {draft.event_id for draft in drafts}
    with_keys = f"{_insert_events_sql(db)} ON CONFLICT (idempotency_key) DO NOTHING RETURNING event_id"
    return {event_id for (event_id,) in db.execute_sql(with_keys, values).fetchall()}


@lru_cache(maxsize=8)
def _insert_events_sql(db: Database) -> str:
    columns = ("event_id", "event_type", "payload", "idempotency_key")
    return (
        f"INSERT INTO events ({', '.join(columns)}, created_at) "
        f"SELECT {', '.join(columns)}, {sql.time(db, 'now')} FROM {sql.values(db, 'drafts', *columns)} WHERE TRUE"
    )


def _first_answer(db: Database, draft: Draft) -> Published | Exception:
    """The answer to an idempotency key that was used before: the first one again, or a conflict."""
    key = sql.param(db, "idempotency_key")
    select = f"SELECT event_id, event_type, payload, created_at FROM events WHERE idempotency_key = {key}"
    row = db.execute_sql(select, {"idempotency_key": draft.new.idempotency_key}).fetchone()
    if row is None:  # purged in this very moment
        return Unavailable("the event of this idempotency key is being purged; nothing was stored, try again")
    event_id, event_type, payload, created_at = row
    expected = payload_of(draft.new.event_type, draft.new.data, clock.legacy_time(read_time(created_at)), UNLIMITED)
    if event_type != draft.new.event_type or not is_same_json(payload, expected):
        return Conflict("this idempotency key was used before, with other content")
    count = f"SELECT count(*) FROM deliveries WHERE event_id = {sql.param(db, 'event_id')}"
    (made,) = db.execute_sql(count, {"event_id": event_id}).fetchone()
    return Published(event_id, event_type, int(made), duplicate=True)


def _fan_out(db: Database, drafts: Sequence[Draft], outlet: Outlet, now: datetime, since: float) -> Counter[str]:
    """Insert the deliveries of new events; returns how many each has."""
    wanted = [
        Wanted(position, draft.event_id, event_type, team)
        for position, draft in enumerate(drafts)
        if draft.new.only is None
        for event_type in subscriptions_to(draft.new.event_type)
        for team in teams_of(draft.new.data)
    ]
    uncommitted = _uncommitted.setdefault(db.top_transaction(), Counter())
    slots = _less(outlet.slots(), uncommitted)
    stored_now, lease_end = stored_time(now), stored_time(now + timedelta(seconds=outlet.lease))
    rows = _insert_matching(db, wanted, slots, stored_now, lease_end) if wanted else []
    for draft in drafts:
        if draft.new.only is not None:
            rows += deliveries.insert(db, draft.new.only, [draft.event_id], stored_now)
    leased = [(row.delivery_id, row.webhook_id) for row in rows if row.leased]
    if len(leased) < len(rows):
        lanes.open_lanes(db, {row.webhook_id for row in rows if not row.leased})
    if leased:
        uncommitted.update(webhook_id for _, webhook_id in leased)
        lanes.after_commit(db, uncommitted.clear, lambda: outlet.wake(Wake(leased, lease_end, since)))
    return Counter(row.event_id for row in rows)


def _less(slots: Slots, leased: Mapping[str, int]) -> Slots:
    """The slots that are left for a transaction that has leased so much already."""
    if not leased:
        return slots
    in_flight = Counter(slots.in_flight) + Counter(leased)
    return Slots(max(slots.free - sum(leased.values()), 0), slots.per_webhook, in_flight)


def _insert_matching(db: Database, wanted: Sequence[Wanted], slots: Slots, now: str, lease_end: str) -> list[Inserted]:
    """Insert deliveries of these events to the webhooks that have subscribed to them, leased where there are slots."""
    most = wanted[-1].position + 1  # deliveries to one webhook
    room = {webhook_id: slots.per_webhook - in_flight for webhook_id, in_flight in slots.in_flight.items()}
    tight = [(webhook_id, max(left, 0)) for webhook_id, left in room.items() if left < most]
    values = {
        "wanted": sql.encoded(wanted),
        "tight": sql.encoded(sorted(tight, key=itemgetter(1))[:TIGHT]),
        "free": slots.free,
        "per_webhook": slots.per_webhook,
        "now": now,
        "lease_end": lease_end,
    }
    return [Inserted(*row) for row in db.execute_sql(_insert_matching_sql(db), values).fetchall()]


@lru_cache(maxsize=8)
def _insert_matching_sql(db: Database) -> str:
    """One statement for all events: a seek in `subscriptions` for each type and team, whatever its size.

    `matched`: the webhooks of each event. `judged`: may they be leased, or must they wait in their lane? `chosen`: the
    first ones, as far as there are slots, are leased.
    """
    now = sql.time(db, "now")
    matching = sql.each(
        db,
        sql.values(db, "wanted", "position integer", "event_id", "event_type", "team"),
        "subscriptions s CROSS JOIN webhooks w",
        "w.webhook_id, w.ordered, w.rate_limit",
        "s.event_type = wanted.event_type AND s.team = wanted.team AND w.webhook_id = s.webhook_id AND w.enabled",
        alias="w",
    )
    return f"""
        WITH tight AS MATERIALIZED (
            SELECT id, room FROM {sql.values(db, "tight", "id", "room integer")}
        ), matched AS (
            SELECT DISTINCT wanted.position, wanted.event_id, w.webhook_id, w.ordered, w.rate_limit {matching}
        ), judged AS (
            SELECT m.*, m.rate_limit IS NULL AND m.ordered IS NOT TRUE AND NOT coalesce((
                SELECT l.failures > 0 OR l.due_at <= {now} OR coalesce(l.open_at > {now}, FALSE)
                FROM lanes l WHERE l.webhook_id = m.webhook_id), FALSE) AS may_be_leased
            FROM matched m
        ), chosen AS (
            SELECT j.*, may_be_leased
                   AND row_number() OVER (ORDER BY position, webhook_id) <= {sql.param(db, "free")}
                   AND row_number() OVER (PARTITION BY webhook_id ORDER BY position)
                       <= coalesce(room, {sql.param(db, "per_webhook")}) AS leased
            FROM judged j LEFT JOIN tight ON tight.id = j.webhook_id
        )
        INSERT INTO deliveries (webhook_id, event_id, leased, next_attempt_at, created_at)
        SELECT webhook_id, event_id, leased, CASE WHEN leased THEN {sql.time(db, "lease_end")}
               ELSE {lanes.next_attempt_sql("ordered", now)} END, {now}
        FROM chosen ORDER BY position
        RETURNING delivery_id, webhook_id, event_id, leased"""
