"""Webhook registrations: register, get, list, update, rotate, unregister.

`WebhookManager` is an ordinary synchronous object. Every method is one unit of work: called on its own it commits,
called inside a transaction it is a savepoint of it. The service calls the same methods through `storage`.
"""

from __future__ import annotations

import base64
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from peewee import Database, Tuple, fn

import models
from hookline import clock, schema
from hookline.errors import Invalid, NotFound
from hookline.storage import connected, open_database, transaction, unavailable_when_it_fails
from models import Subscription, UtcField, Webhook

MIN_SECRET = 16  # characters
MAX_EVENTS = 1000  # event types of one webhook
MASK = "***"

# The hot statements, as text: building them with the ORM costs ten times what running them does.
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
SHOWN_COLUMNS = [
    "webhook_id",
    "url",
    "events",
    "team",
    "description",
    "headers",
    "enabled",
    "disabled_reason",
    "created_at",
    "updated_at",
    "total_calls",
    "failed_calls",
    "last_success",
    "last_failure",
]
TIMES = ("created_at", "updated_at", "last_success", "last_failure")

Rows = list[dict[str, Any]]

utc = UtcField()


class WebhookManager:
    """The registrations in one database.

    `WebhookManager("data/webhooks.db")` opens that file and brings its schema up to date, creating it if need be.
    The service passes its own `db`, which it has migrated by hand.
    """

    def __init__(self, db_path: str | os.PathLike[str] = "data/webhooks.db", *, db: Database | None = None) -> None:
        self._owns_database = db is None
        self.db = db if db is not None else open_database(f"sqlite:///{os.fspath(db_path)}")
        if self._owns_database:
            if models.db.obj is None:
                models.db.initialize(self.db)
            schema.up(self.db)
        slots = ", ".join([self.db.param] * len(REGISTER_COLUMNS))
        self._insert = (
            f"INSERT INTO webhooks ({', '.join(REGISTER_COLUMNS)}, enabled, total_calls, failed_calls) "
            f"VALUES ({slots}, TRUE, 0, 0)"
        )
        self._select = f"SELECT {', '.join(SHOWN_COLUMNS)} FROM webhooks WHERE webhook_id = {self.db.param}"
        self._delete = f"DELETE FROM webhooks WHERE webhook_id = {self.db.param}"

    async def startup(self) -> None:
        """Kept for callers of the replaced manager: the database is ready once this object exists."""

    async def shutdown(self) -> None:
        """Close the database, if this object opened it."""
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
        """Store a webhook; returns its new id. Raises Invalid, Unavailable."""
        check(url, events, secret, team)
        webhook_id = str(uuid.uuid4())
        now = utc.db_value(clock.now())
        sent_headers = json.dumps(dict(headers)) if headers else None
        row = (webhook_id, url, json.dumps(list(events)), secret, team, now, now, description, sent_headers)
        with unavailable_when_it_fails(), transaction(self.db):
            self.db.execute_sql(self._insert, row)
            self._subscribe(webhook_id, events, team)
        return webhook_id

    def unregister(self, webhook_id: str) -> bool:
        """Delete a webhook and all that hangs on it; False if there is none of that id. Raises Unavailable."""
        with unavailable_when_it_fails(), transaction(self.db):
            return bool(self.db.execute_sql(self._delete, (webhook_id,)).rowcount)

    def get(self, webhook_id: str) -> dict[str, Any]:
        """One webhook, without its secret. Raises NotFound, Unavailable."""
        with connected(self.db), unavailable_when_it_fails():
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

        `event` finds those that would get events of this type, `*` included. Raises Unavailable.
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
            query = query.where(Tuple(Webhook.created_at, Webhook.webhook_id) > Tuple(utc.db_value(after[0]), after[1]))
        with unavailable_when_it_fails(), connected(self.db):
            return [shown(row) for row in query.tuples().bind(self.db).execute()]

    def get_all(self) -> Rows:
        """Every webhook in the replaced manager's form: `id`, naive ISO times, the secret as `***`."""
        return [legacy(webhook) for webhook in self._everything()]

    @property
    def webhooks(self) -> Mapping[str, dict[str, Any]]:
        """A read-only mapping of id to webhook that asks the database each time, so that processes agree."""
        return Registrations(self)

    def update(self, webhook_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change what is given (url, events, team, description, headers, enabled); returns the webhook.

        Raises NotFound, Invalid, Unavailable.
        """
        with unavailable_when_it_fails(), transaction(self.db):
            before = self.get(webhook_id)
            after = {**before, **changes}
            check(after["url"], after["events"], None, after["team"])
            values = {name: encoded(name, value) for name, value in changes.items()}
            if changes.get("enabled"):
                values |= {"disabled_reason": None, "failing_since": None}
            values["updated_at"] = clock.now()
            Webhook.update(values).where(Webhook.webhook_id == webhook_id).execute(self.db)
            if "events" in changes or "team" in changes:
                Subscription.delete().where(Subscription.webhook == webhook_id).execute(self.db)
                self._subscribe(webhook_id, after["events"], after["team"])
            return self.get(webhook_id)

    def rotate(self, webhook_id: str, secret: str, overlap_seconds: int) -> datetime | None:
        """Replace the secret; the old one keeps signing beside it for `overlap_seconds`.

        Returns when the old one expires, None if it is gone at once. Raises NotFound, Invalid, Unavailable.
        """
        check_secret(secret)
        now = clock.now()
        expires = now + timedelta(seconds=overlap_seconds) if overlap_seconds else None
        with unavailable_when_it_fails(), transaction(self.db):
            changed = (
                Webhook.update(
                    previous_secret=Webhook.secret if expires else None,
                    previous_secret_expires_at=expires,
                    secret=secret,
                    updated_at=now,
                )
                .where(Webhook.webhook_id == webhook_id)
                .execute(self.db)
            )
            if not changed:
                raise NotFound("Webhook not found")
        return expires

    def _everything(self) -> Iterator[dict[str, Any]]:
        query = Webhook.select(*(getattr(Webhook, name) for name in SHOWN_COLUMNS))
        query = query.order_by(Webhook.created_at, Webhook.webhook_id).tuples().bind(self.db)
        sql, params = query.sql()
        with unavailable_when_it_fails(), connected(self.db):
            yield from map(shown, self.db.execute_sql(sql, params).fetchall())

    def _subscribe(self, webhook_id: str, events: Iterable[str], team: str | None) -> None:
        rows = [(event, team or "", webhook_id) for event in dict.fromkeys(events)]
        if rows:
            sql = subscribe_sql(self.db.param, len(rows))
            self.db.execute_sql(sql, [value for row in rows for value in row])


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
        with unavailable_when_it_fails(), connected(self._manager.db):
            return int(Webhook.select().count(self._manager.db))


def generate_secret() -> str:
    """A new secret: `whsec_` and the base64 of 32 random bytes (Standard Webhooks 1.0.0)."""
    return "whsec_" + base64.b64encode(os.urandom(32)).decode()


def check(url: str, events: Sequence[str], secret: str | None, team: str | None) -> None:
    """Refuse what no edge should let through. Raises Invalid; no message holds a secret."""
    if not url.lower().startswith(("http://", "https://")):
        raise Invalid("url must start with http:// or https://")
    if isinstance(events, str) or len(events) > MAX_EVENTS:
        raise Invalid(f"events must be a list of at most {MAX_EVENTS} event types")
    if not all(isinstance(event, str) for event in events):
        raise Invalid("events must be a list of strings")
    for name, text in (("url", url), ("team", team), *(("events", event) for event in events)):
        check_text(name, text)
    if secret is not None:
        check_secret(secret)


def check_secret(secret: str) -> None:
    """Raises Invalid unless it is long enough and, with the prefix `whsec_`, base64."""
    if len(secret) < MIN_SECRET:
        raise Invalid(f"secret must have at least {MIN_SECRET} characters")
    check_text("secret", secret)
    if (problem := secret_problem(secret)) is not None:
        raise Invalid(f"secret {problem}")


def secret_problem(secret: str) -> str | None:
    """What is wrong with a `whsec_` secret, None if nothing."""
    if not secret.startswith("whsec_"):
        return None
    encoded_key = secret.removeprefix("whsec_")
    try:
        base64.b64decode(encoded_key + "=" * (-len(encoded_key) % 4), validate=True)
    except ValueError:
        return "starts with whsec_ but the rest is not base64"
    return None


def check_text(name: str, text: str | None) -> None:
    """Raises Invalid for what the two databases would store differently: NUL and lone surrogates."""
    if text is None:
        return
    if "\0" in text:
        raise Invalid(f"{name} must not contain NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{name} must not contain lone surrogates") from None


@lru_cache(maxsize=128)
def subscribe_sql(param: str, rows: int) -> str:
    slots = ", ".join([f"({param}, {param}, {param})"] * rows)
    return f"INSERT INTO subscriptions (event_type, team, webhook_id) VALUES {slots}"


def wants(event: str) -> Any:
    """Does the outer query's webhook have a subscription to this type? One primary-key seek each."""
    return Subscription.select(1).where(
        Subscription.event_type.in_([event, "*"]),
        Subscription.team == fn.COALESCE(Webhook.team, ""),
        Subscription.webhook == Webhook.webhook_id,
    )


def encoded(name: str, value: Any) -> Any:
    return json.dumps(value) if name in ("events", "headers") and value is not None else value


def shown(row: Sequence[Any]) -> dict[str, Any]:
    """A row of SHOWN_COLUMNS as plain values: times in UTC, header values masked (they may be credentials)."""
    webhook = dict(zip(SHOWN_COLUMNS, row, strict=True))
    for name in TIMES:
        if webhook[name] is not None:
            webhook[name] = utc.python_value(webhook[name])
    webhook["events"] = json.loads(webhook["events"])
    webhook["enabled"] = bool(webhook["enabled"])
    webhook["headers"] = dict.fromkeys(json.loads(webhook["headers"]), MASK) if webhook["headers"] else {}
    return webhook


def legacy(webhook: Mapping[str, Any]) -> dict[str, Any]:
    """A webhook in the order and form of the replaced service."""
    return {
        "url": webhook["url"],
        "events": webhook["events"],
        "secret": MASK,
        "team": webhook["team"],
        "created_at": legacy_time(webhook["created_at"]),
        "total_calls": webhook["total_calls"],
        "failed_calls": webhook["failed_calls"],
        "last_success": legacy_time(webhook["last_success"]),
        "last_failure": legacy_time(webhook["last_failure"]),
        "enabled": webhook["enabled"],
        "id": webhook["webhook_id"],
    }


def legacy_time(moment: datetime | None) -> str | None:
    """As `datetime.utcnow().isoformat()` wrote it: no zone, no fraction when it is zero."""
    return moment.replace(tzinfo=None).isoformat() if moment else None
