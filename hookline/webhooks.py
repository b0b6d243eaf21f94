"""Webhook registrations: register, get, list, update, rotate, unregister.

`WebhookManager` is an ordinary synchronous object. Every method is one unit of work: called on its own it commits,
called inside a transaction it is a savepoint of it. The service calls the same methods through `storage`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from ipaddress import ip_network
from typing import Any

from peewee import Database, Tuple, fn
from uuid_utils import uuid7

import models
from hookline import clock, events, lanes, missed, removal, rotation
from hookline.egress import Client
from hookline.errors import Conflict, NotFound
from hookline.events import NewEvent, Published
from hookline.legacy import MASK, legacy
from hookline.policy import Rules
from hookline.registration import MIN_SECRET, Registration, check, check_changes, check_rotation
from hookline.store import forks, locks, schema, sql
from hookline.store.open import POSTGRES_SCHEMES, SQLITE_SCHEME, adopt, open_database, storage_of
from hookline.store.units import connected, transaction
from hookline.worker import reports
from hookline.worker.worker import Worker
from models import Subscription, Webhook, read_time, stored_time

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

Rows = list[dict[str, Any]]


class WebhookManager:
    """The registrations in one database.

    `WebhookManager("data/webhooks.db")` opens that file and brings its schema up to date, creating it if need be; so
    does the URL of a database, such as `postgresql://user:password@host/name`. The service passes its own `db`, which
    it has migrated by hand. `allowed_networks`: where `startup()` may deliver besides public addresses, such as
    `["192.168.0.0/16"]`. Raises Invalid, also if `db` is SQLite that does not enforce foreign keys, and Unavailable.
    """

    def __init__(
        self,
        db_path: str | os.PathLike[str] = "data/webhooks.db",
        *,
        db: Database | None = None,
        allowed_networks: Sequence[str] = (),
    ) -> None:
        self._allowed = [ip_network(network) for network in allowed_networks]
        self._worker: Worker | None = None
        self._owns_database = db is None
        self.db = db if db is not None else open_database(url_of(db_path), create=True)
        if self._owns_database:
            if models.db.obj is None:
                models.db.initialize(self.db)
            schema.up(self.db)
        else:
            adopt(self.db)
        forks.follow_state(self)
        self._insert = (
            f"INSERT INTO webhooks ({', '.join(REGISTER_COLUMNS)}, enabled, total_calls, failed_calls) "
            f"SELECT {', '.join(REGISTER_COLUMNS)}, TRUE, 0, 0 FROM {sql.rows(self.db, *REGISTER_TYPES)}"
        )
        self._subscribe = (
            "INSERT INTO subscriptions (event_type, team, webhook_id) "
            f"SELECT event_type, team, webhook_id FROM {sql.rows(self.db, 'event_type', 'team', 'webhook_id')}"
        )
        self._select = f"SELECT {', '.join(SHOWN_COLUMNS)} FROM webhooks WHERE webhook_id = {self.db.param}"
        self._delete = f"DELETE FROM webhooks WHERE webhook_id = {self.db.param}"

    def forked(self) -> None:
        """In a child of a fork: the worker is the parent's; `startup()` starts one here."""
        self._worker = None

    async def startup(self) -> None:
        """Deliver from now on, if this object opened its database: else the service does."""
        if self._owns_database and self._worker is None:
            storage = storage_of(self.db)
            await storage.start()
            self._worker = Worker(storage, Client(allowed=self._allowed), Rules())
            await self._worker.start()

    async def shutdown(self) -> None:
        """Finish or release what is in flight, and close the database, if this object opened it."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()
            await worker.storage.stop()
        if self._owns_database:
            self.db.close_all()  # type: ignore[attr-defined]

    def register(
        self,
        url: str,
        events: Sequence[str],
        secret: str,
        team: str | None = None,
        *,
        description: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Store a webhook; returns its new id. Raises Invalid, Unavailable.

        A secret of fewer than 16 characters is taken, with a warning in the log, as the replaced manager took it.
        """
        return self.register_all([Registration(url, events, secret, team, description, headers)])[0]

    def register_all(self, registrations: Sequence[Registration]) -> list[str]:
        """Store these webhooks, all or none; returns their new ids, in order. Raises Invalid, Unavailable."""
        return [str(row[0]) for row in self._store(registrations)]

    def create_all(self, registrations: Sequence[Registration]) -> Rows:
        """The same; returns the new webhooks as `get` would, without reading them again."""
        return [shown(new_row(row)) for row in self._store(registrations)]

    def _store(self, registrations: Sequence[Registration]) -> Sequence[Sequence[str | None]]:
        """The new rows, of REGISTER_COLUMNS."""
        for new in registrations:
            check(new._asdict())
        now = stored_time(clock.now())
        ids = [str(uuid7()) for _ in registrations]  # ordered by time: new rows share pages, so commits are small
        webhooks = [inserted(id_, new, now) for id_, new in zip(ids, registrations, strict=True)]
        wanted = [
            row for id_, new in zip(ids, registrations, strict=True) for row in subscriptions(id_, new.events, new.team)
        ]
        with transaction(self.db):
            self.db.execute_sql(self._insert, (sql.parameter(webhooks),))
            self.db.execute_sql(self._subscribe, (sql.parameter(wanted),))
        for id_, new in zip(ids, registrations, strict=True):
            warn_of_short(id_, new.secret)
        return webhooks

    def unregister(self, webhook_id: str) -> bool:
        """Delete a webhook and all that hangs on it; False if there is none of that id. Raises Unavailable.

        If it has many deliveries they go first, in short steps, unless the caller's own transaction is open.
        """
        if not self.db.in_transaction():
            removal.clear(self.db, webhook_id)
        with transaction(self.db):
            return bool(self.db.execute_sql(self._delete, (webhook_id,)).rowcount)

    def get(self, webhook_id: str) -> dict[str, Any]:
        """One webhook, without its secret. Raises NotFound, Unavailable."""
        with connected(self.db):
            row = self.db.execute_sql(self._select, (webhook_id,)).fetchone()
        if row is None:
            raise NotFound("Webhook not found")
        return shown(row)

    def list(
        self,
        *,
        team: str | None = None,
        event: str | None = None,
        enabled: bool | None = None,
        limit: int = 50,
        after: tuple[datetime, str] | None = None,
    ) -> Rows:
        """At most `limit` webhooks, oldest first, from the one behind `after` (its created_at and id).

        `event` finds those that would get events of this type, also through `*`. Raises Unavailable.
        """
        query = Webhook.select(*(getattr(Webhook, name) for name in SHOWN_COLUMNS))
        query = query.order_by(Webhook.created_at, Webhook.webhook_id).limit(limit)
        if team is not None:
            query = query.where(Webhook.team == team)
        if enabled is not None:
            query = query.where(Webhook.enabled == enabled)
        if event is not None:
            query = query.where(fn.EXISTS(wants(event)))
        if after is not None:
            query = query.where(Tuple(Webhook.created_at, Webhook.webhook_id) > Tuple(stored_time(after[0]), after[1]))
        with connected(self.db):
            return [shown(row) for row in query.tuples().bind(self.db).execute()]

    def get_all(self) -> Rows:
        """Every webhook in the replaced manager's form: `id`, naive ISO times, the secret as `***`."""
        return [legacy(webhook) for webhook in self._everything()]

    @property
    def webhooks(self) -> Mapping[str, dict[str, Any]]:
        """A read-only mapping of id to webhook that asks the database each time, so that processes agree."""
        return Registrations(self)

    def update(self, webhook_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change what is given; returns the webhook. Raises NotFound, Invalid, Unavailable.

        May be given: url, events, team, description, headers, enabled, retry_schedule (seconds before each retry),
        rate_limit (deliveries per second), ordered. Enabling it again clears its failures, and the answer has a
        `replay`: since when it missed deliveries, and how many a replay would bring back (see `missed.count`).
        """
        webhook, began = self.change(webhook_id, changes)
        if began is not None:
            webhook["replay"] = missed.since(self.db, webhook_id, began)
        return webhook

    def change(self, webhook_id: str, changes: Mapping[str, Any]) -> tuple[dict[str, Any], datetime | None]:
        """Like `update`, but what it missed is not counted: that takes time which a transaction does not have.

        Instead, and if it is enabled again, also returns when it began to fail or was disabled: for `missed.since`.
        """
        check_changes(changes)
        with transaction(self.db):
            locks.lock_webhooks(self.db, [webhook_id])
            before = self.get(webhook_id)
            after = {**before, **changes}
            values = {name: encoded(name, value) for name, value in changes.items()}
            if changes.get("enabled", before["enabled"]) != before["enabled"]:
                values |= self._switched(webhook_id, changes["enabled"])
            if after["url"] != before["url"]:
                values["failing_since"] = None  # the new endpoint has not failed yet
            values["updated_at"] = clock.now()
            began = self._began_missing(webhook_id) if after["enabled"] and not before["enabled"] else None
            Webhook.update(values).where(Webhook.webhook_id == webhook_id).execute(self.db)
            lanes.reopen(self.db, webhook_id, before, changes)
            if "events" in changes or "team" in changes:
                Subscription.delete().where(Subscription.webhook == webhook_id).execute(self.db)
                rows = subscriptions(webhook_id, after["events"], after["team"])
                self.db.execute_sql(self._subscribe, (sql.parameter(rows),))
            return self.get(webhook_id), began

    def _switched(self, webhook_id: str, enabled: bool) -> dict[str, Any]:
        """What changes with `enabled`. What waits for a disabled webhook is cancelled, by the worker, in its lane."""
        lanes.queue(self.db, lanes.OF_WEBHOOKS, sql.ids([webhook_id]), open_now=True)
        if enabled:
            return {"disabled_at": None, "disabled_reason": None, "failing_since": None}
        lanes.after_commit(self.db, partial(reports.disabled, webhook_id, BY_REQUEST))
        return {"disabled_at": clock.now(), "disabled_reason": BY_REQUEST}

    def _began_missing(self, webhook_id: str) -> datetime | None:
        """When it began to fail, or was disabled."""
        query = Webhook.select(Webhook.failing_since, Webhook.disabled_at).where(Webhook.webhook_id == webhook_id)
        failing_since, disabled_at = query.tuples().bind(self.db).execute()[0]
        began: datetime | None = failing_since or disabled_at
        return began

    def send_event(self, event_type: str, event_data: Mapping[str, Any]) -> Published:
        """Store an event and a delivery of it to every matching webhook. Raises Invalid, TooLarge, Unavailable.

        They are sent by whichever worker runs on this database: the service's, or ours after `startup()`.
        """
        return events.publish_one(self.db, NewEvent(event_type, event_data))

    def send_test(
        self, webhook_id: str, event_type: str | None = None, data: Mapping[str, Any] | None = None
    ) -> Published:
        """An event for this webhook alone, whatever it has subscribed to: of type `hookline.webhook.test` unless given.

        Raises NotFound, Conflict (it is disabled), Invalid, TooLarge, Unavailable.
        """
        kind = events.TEST_EVENT if event_type is None else event_type
        new = NewEvent(kind, events.TEST_DATA if data is None else data, only=webhook_id)
        with transaction(self.db):
            if not self.get(webhook_id)["enabled"]:
                raise Conflict("the webhook is disabled: enable it first")
            return events.publish_one(self.db, new)

    def rotate(self, webhook_id: str, secret: str, overlap_seconds: int) -> datetime | None:
        """Replace the secret; the old one keeps signing beside it for `overlap_seconds`, as do earlier ones until then.

        Without an overlap all of them are gone at once. Returns when the newest of them expires, None if there is none.
        Raises NotFound, Invalid, Conflict (too many are valid already), Unavailable.
        """
        check_rotation(secret, overlap_seconds)
        now = clock.now()
        expires = now + timedelta(seconds=overlap_seconds) if overlap_seconds else None
        with transaction(self.db):
            values = rotation.rotated(self.db, webhook_id, secret, expires)
            if values is None:
                raise NotFound("Webhook not found")
            Webhook.update(values, updated_at=now).where(Webhook.webhook_id == webhook_id).execute(self.db)
        warn_of_short(webhook_id, secret)
        newest: datetime | None = values["previous_secret_expires_at"]
        return newest

    def _everything(self) -> Iterator[dict[str, Any]]:
        query = Webhook.select(*(getattr(Webhook, name) for name in SHOWN_COLUMNS))
        query = query.order_by(Webhook.created_at, Webhook.webhook_id).tuples().bind(self.db)
        with connected(self.db):
            yield from map(shown, self.db.execute_sql(*query.sql()).fetchall())


def url_of(place: str | os.PathLike[str]) -> str:
    """The URL of a database, given as such or as the path of an SQLite file."""
    text = os.fspath(place)
    return text if text.startswith((*POSTGRES_SCHEMES, SQLITE_SCHEME)) else SQLITE_SCHEME + text


class Registrations(Mapping[str, dict[str, Any]]):
    """`manager.webhooks`: the replaced manager's dictionary, read from the database at every use."""

    def __init__(self, manager: WebhookManager) -> None:
        self._manager = manager

    def __getitem__(self, webhook_id: str) -> dict[str, Any]:
        try:
            webhook = legacy(self._manager.get(webhook_id))
        except NotFound:
            raise KeyError(webhook_id) from None
        del webhook["id"]
        return webhook

    def __iter__(self) -> Iterator[str]:
        return iter([webhook["webhook_id"] for webhook in self._manager._everything()])

    def __len__(self) -> int:
        with connected(self._manager.db):
            return int(Webhook.select().count(self._manager.db))


def warn_of_short(webhook_id: str, secret: str) -> None:
    if len(secret) < MIN_SECRET:
        log.warning("webhook %s: its secret has fewer than %s characters and may be guessed", webhook_id, MIN_SECRET)


def inserted(webhook_id: str, new: Registration, now: str) -> tuple[str | None, ...]:
    """The row of REGISTER_COLUMNS."""
    events = json.dumps(list(new.events))
    headers = json.dumps(dict(new.headers)) if new.headers else None
    return (webhook_id, new.url, events, new.secret, new.team, now, now, new.description, headers)


def new_row(inserted: Sequence[str | None]) -> list[Any]:
    """A row of SHOWN_COLUMNS, as it is right after its insertion."""
    row = {**dict(zip(REGISTER_COLUMNS, inserted, strict=True)), "enabled": True, "total_calls": 0, "failed_calls": 0}
    return [row.get(name) for name in SHOWN_COLUMNS]


def subscriptions(webhook_id: str, events: Iterable[str], team: str | None) -> list[tuple[str, str, str]]:
    return [(event, team or "", webhook_id) for event in dict.fromkeys(events)]


def wants(event: str) -> Any:
    """Does the outer query's webhook have a subscription to this type? One primary-key seek each."""
    return Subscription.select(1).where(
        Subscription.event_type.in_(events.subscriptions_to(event)),
        Subscription.team == fn.COALESCE(Webhook.team, ""),
        Subscription.webhook == Webhook.webhook_id,
    )


def encoded(name: str, value: Any) -> Any:
    if value is None or name not in ("events", "headers", "retry_schedule"):
        return value
    return json.dumps(dict(value) if name == "headers" else list(value))


def shown(row: Sequence[Any]) -> dict[str, Any]:
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
