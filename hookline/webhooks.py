"""Webhooks: register, get, list, change, rotate, unregister.

Every function is one unit of work on the given database: called on its own it commits, called inside a transaction it
is a savepoint of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache, partial
from typing import Any

from peewee import Database, Tuple, fn
from uuid_utils import uuid7

from hookline import clock, events, lanes, missed, removal, rotation
from hookline.errors import Conflict, NotFound
from hookline.events import NewEvent, Published
from hookline.registration import MASK, MIN_SECRET, Registration, check, check_changes, check_rotation
from hookline.store import locks, sql
from hookline.store.units import connected, transaction
from hookline.tables import Subscription, Webhook, read_time, stored_time

log = logging.getLogger("hookline")

BY_REQUEST = "disabled by request"
REGISTER_COLUMNS = (
    "webhook_id",
    "url",
    "events",
    "secret",
    "team",
    "created_at",
    "updated_at",
    "description",
    "headers",
)
REGISTER_TYPES = [f"{name} timestamptz" if name in ("created_at", "updated_at") else name for name in REGISTER_COLUMNS]
SHOWN_COLUMNS = [
    "webhook_id",
    "url",
    "events",
    "team",
    "description",
    "headers",
    "enabled",
    "disabled_at",
    "disabled_reason",
    "retry_schedule",
    "rate_limit",
    "ordered",
    "created_at",
    "updated_at",
    "total_calls",
    "failed_calls",
    "last_success",
    "last_failure",
]
TIMES = ("created_at", "updated_at", "disabled_at", "last_success", "last_failure")

Row = dict[str, Any]


def register(db: Database, new: Registration) -> str:
    """Store a webhook; returns its new id. Raises Invalid, Unavailable."""
    return register_all(db, [new])[0]


def register_all(db: Database, registrations: Sequence[Registration]) -> list[str]:
    """Store these webhooks, all or none; returns their new ids, in order. Raises Invalid, Unavailable."""
    return [str(row[0]) for row in _store(db, registrations)]


def create_all(db: Database, registrations: Sequence[Registration]) -> list[Row]:
    """Like `register_all`; returns the new webhooks as `get` would, without reading them again."""
    return [_shown(_new_row(row)) for row in _store(db, registrations)]


def unregister(db: Database, webhook_id: str) -> bool:
    """Delete a webhook and all that hangs on it; False if there is none of that id. Raises Unavailable.

    If it has many deliveries they go first, in short steps, unless the caller's own transaction is open.
    """
    if not db.in_transaction():
        removal.delete_deliveries(db, webhook_id)
    with transaction(db):
        delete = f"DELETE FROM webhooks WHERE webhook_id = {sql.param(db, 'webhook_id')}"
        return bool(db.execute_sql(delete, {"webhook_id": webhook_id}).rowcount)


def get(db: Database, webhook_id: str) -> Row:
    """One webhook, without its secret. Raises NotFound, Unavailable."""
    with connected(db):
        row = db.execute_sql(_select_sql(db), {"webhook_id": webhook_id}).fetchone()
    if row is None:
        raise NotFound("Webhook not found")
    return _shown(row)


def page(
    db: Database,
    *,
    team: str | None = None,
    event: str | None = None,
    enabled: bool | None = None,
    limit: int = 50,
    after: tuple[datetime, str] | None = None,
) -> list[Row]:
    """At most `limit` webhooks, oldest first, from the one behind `after` (its created_at and id).

    `event` finds those that would get events of this type, also through `*`. Raises Unavailable.
    """
    query = _query().limit(limit)
    if team is not None:
        query = query.where(Webhook.team == team)
    if enabled is not None:
        query = query.where(Webhook.enabled == enabled)
    if event is not None:
        query = query.where(fn.EXISTS(_wants(event)))
    if after is not None:
        query = query.where(Tuple(Webhook.created_at, Webhook.webhook_id) > Tuple(stored_time(after[0]), after[1]))
    with connected(db):
        return [_shown(row) for row in query.bind(db).execute()]


def everything(db: Database) -> Iterator[Row]:
    """Every webhook, oldest first. Raises Unavailable."""
    with connected(db):
        yield from map(_shown, db.execute_sql(*_query().bind(db).sql()).fetchall())


def count(db: Database) -> int:
    """How many there are. Raises Unavailable."""
    with connected(db):
        return int(Webhook.select().count(db))


def update(db: Database, webhook_id: str, changes: Mapping[str, Any]) -> Row:
    """Change what is given; returns the webhook. Raises NotFound, Invalid, Unavailable.

    May be given: url, events, team, description, headers, enabled, retry_schedule (seconds before each retry),
    rate_limit (deliveries per second), ordered. Enabling it again clears its failures, and the answer has a
    `replay`: since when it missed deliveries, and how many a replay would bring back (see `missed.count`).
    """
    webhook, began = change(db, webhook_id, changes)
    if began is not None:
        webhook["replay"] = missed.since(db, webhook_id, began)
    return webhook


def change(db: Database, webhook_id: str, changes: Mapping[str, Any]) -> tuple[Row, datetime | None]:
    """Like `update`, but does not count what it missed: that takes time which a transaction does not have.

    Instead, and if it is enabled again, also returns when it began to fail or was disabled: for `missed.since`.
    """
    check_changes(changes)
    with transaction(db):
        locks.lock_webhooks(db, [webhook_id])
        before = get(db, webhook_id)
        after = {**before, **changes}
        values = {name: _stored(name, value) for name, value in changes.items()}
        if after["enabled"] != before["enabled"]:
            values |= _switched(db, webhook_id, after["enabled"])
        if after["url"] != before["url"]:
            values["failing_since"] = None  # the new endpoint has not failed yet
        values["updated_at"] = clock.now()
        began = _began_missing(db, webhook_id) if after["enabled"] and not before["enabled"] else None
        Webhook.update(values).where(Webhook.webhook_id == webhook_id).execute(db)
        lanes.reopen(db, webhook_id, before, changes)
        if "events" in changes or "team" in changes:
            Subscription.delete().where(Subscription.webhook == webhook_id).execute(db)
            _subscribe(db, _subscriptions(webhook_id, after["events"], after["team"]))
        return get(db, webhook_id), began


def rotate(db: Database, webhook_id: str, secret: str, overlap_seconds: int) -> datetime | None:
    """Replace the secret; the old one keeps signing beside it for `overlap_seconds`, as do earlier ones until then.

    Without an overlap all of them are gone at once. Returns when the newest of them expires, None if there is none.
    Raises NotFound, Invalid, Conflict (too many are valid already), Unavailable.
    """
    check_rotation(secret, overlap_seconds)
    now = clock.now()
    expires = now + timedelta(seconds=overlap_seconds) if overlap_seconds else None
    with transaction(db):
        values = rotation.rotated(db, webhook_id, secret, expires)
        if values is None:
            raise NotFound("Webhook not found")
        Webhook.update(values, updated_at=now).where(Webhook.webhook_id == webhook_id).execute(db)
    _warn_of_short(webhook_id, secret)
    newest: datetime | None = values["previous_secret_expires_at"]
    return newest


def send_test(
    db: Database, webhook_id: str, event_type: str | None = None, data: Mapping[str, Any] | None = None
) -> Published:
    """Publish an event for this webhook alone, whatever it subscribes to: `hookline.webhook.test` unless given.

    Raises NotFound, Conflict (it is disabled), Invalid, TooLarge, Unavailable.
    """
    kind = events.TEST_EVENT if event_type is None else event_type
    new = NewEvent(kind, events.TEST_DATA if data is None else data, only=webhook_id)
    with transaction(db):
        if not get(db, webhook_id)["enabled"]:
            raise Conflict("the webhook is disabled: enable it first")
        return events.publish_one(db, new)


def log_disabled(webhook_id: str, why: str) -> None:
    """Tell the operator that a webhook gets nothing any more."""
    log.warning("webhook %s was disabled: %s", webhook_id, why)


def _store(db: Database, registrations: Sequence[Registration]) -> Sequence[Sequence[str | None]]:
    """Insert these; returns the new rows, of REGISTER_COLUMNS."""
    for new in registrations:
        check(new._asdict())
    now = stored_time(clock.now())
    ids = [str(uuid7()) for _ in registrations]  # ordered by time: new rows share pages, so commits are small
    created = list(zip(ids, registrations, strict=True))
    rows = [_inserted(webhook_id, new, now) for webhook_id, new in created]
    with transaction(db):
        db.execute_sql(_insert_sql(db), {"created": sql.encoded(rows)})
        wanted = [row for webhook_id, new in created for row in _subscriptions(webhook_id, new.events, new.team)]
        _subscribe(db, wanted)
    for webhook_id, new in created:
        _warn_of_short(webhook_id, new.secret)
    return rows


@lru_cache(maxsize=8)
def _insert_sql(db: Database) -> str:
    return (
        f"INSERT INTO webhooks ({', '.join(REGISTER_COLUMNS)}, enabled, total_calls, failed_calls) "
        f"SELECT {', '.join(REGISTER_COLUMNS)}, TRUE, 0, 0 FROM {sql.values(db, 'created', *REGISTER_TYPES)}"
    )


@lru_cache(maxsize=8)
def _select_sql(db: Database) -> str:
    return f"SELECT {', '.join(SHOWN_COLUMNS)} FROM webhooks WHERE webhook_id = {sql.param(db, 'webhook_id')}"


@lru_cache(maxsize=8)
def _subscribe_sql(db: Database) -> str:
    return (
        "INSERT INTO subscriptions (event_type, team, webhook_id) "
        f"SELECT event_type, team, webhook_id FROM {sql.values(db, 'wanted', 'event_type', 'team', 'webhook_id')}"
    )


def _subscribe(db: Database, wanted: Sequence[tuple[str, str, str]]) -> None:
    db.execute_sql(_subscribe_sql(db), {"wanted": sql.encoded(wanted)})


def _query() -> Any:
    query = Webhook.select(*(getattr(Webhook, name) for name in SHOWN_COLUMNS))
    return query.order_by(Webhook.created_at, Webhook.webhook_id).tuples()


def _switched(db: Database, webhook_id: str, enabled: bool) -> Row:
    """Return the columns that change with `enabled`. The worker cancels what waits for a disabled one."""
    lanes.open_lanes(db, [webhook_id], now=True)
    if enabled:
        return {"disabled_at": None, "disabled_reason": None, "failing_since": None}
    lanes.after_commit(db, partial(log_disabled, webhook_id, BY_REQUEST))
    return {"disabled_at": clock.now(), "disabled_reason": BY_REQUEST}


def _began_missing(db: Database, webhook_id: str) -> datetime | None:
    """When it began to fail, or was disabled."""
    query = Webhook.select(Webhook.failing_since, Webhook.disabled_at).where(Webhook.webhook_id == webhook_id)
    failing_since, disabled_at = query.tuples().bind(db).execute()[0]
    began: datetime | None = failing_since or disabled_at
    return began


def _warn_of_short(webhook_id: str, secret: str) -> None:
    if len(secret) < MIN_SECRET:
        log.warning("webhook %s: its secret has fewer than %s characters and may be guessed", webhook_id, MIN_SECRET)


def _inserted(webhook_id: str, new: Registration, now: str) -> tuple[str | None, ...]:
    """The row of REGISTER_COLUMNS."""
    events = json.dumps(list(new.events))
    headers = json.dumps(dict(new.headers)) if new.headers else None
    return (webhook_id, new.url, events, new.secret, new.team, now, now, new.description, headers)


def _new_row(inserted: Sequence[str | None]) -> list[Any]:
    """A row of SHOWN_COLUMNS, as it is right after its insertion."""
    row = {**dict(zip(REGISTER_COLUMNS, inserted, strict=True)), "enabled": True, "total_calls": 0, "failed_calls": 0}
    return [row.get(name) for name in SHOWN_COLUMNS]


def _subscriptions(webhook_id: str, events: Iterable[str], team: str | None) -> list[tuple[str, str, str]]:
    return [(event, team or "", webhook_id) for event in dict.fromkeys(events)]


def _wants(event: str) -> Any:
    """Does the outer query's webhook have a subscription to this type? One primary-key seek each."""
    return Subscription.select(1).where(
        Subscription.event_type.in_(events.subscriptions_to(event)),
        Subscription.team == fn.COALESCE(Webhook.team, ""),
        Subscription.webhook == Webhook.webhook_id,
    )


def _stored(name: str, value: Any) -> Any:
    if value is None or name not in ("events", "headers", "retry_schedule"):
        return value
    return json.dumps(dict(value) if name == "headers" else list(value))


def _shown(row: Sequence[Any]) -> dict[str, Any]:
    """A row of SHOWN_COLUMNS as plain values: times in UTC, header values masked (they may be credentials)."""
    webhook = dict(zip(SHOWN_COLUMNS, row, strict=True))
    for name in TIMES:
        webhook[name] = read_time(webhook[name])
    webhook["events"] = json.loads(webhook["events"])
    webhook["enabled"] = bool(webhook["enabled"])
    webhook["ordered"] = bool(webhook["ordered"])
    webhook["retry_schedule"] = json.loads(webhook["retry_schedule"]) if webhook["retry_schedule"] else None
    webhook["headers"] = dict.fromkeys(json.loads(webhook["headers"]), MASK) if webhook["headers"] else {}
    return webhook
