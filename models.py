"""The tables: Peewee models, their constraints and indexes. No policy here.

`db` is bound once, by whoever assembles the program (`app.py`, `manage.py`, a `WebhookManager`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from peewee import (
    SQL,
    BigAutoField,
    BigIntegerField,
    BooleanField,
    CompositeKey,
    DatabaseProxy,
    DoubleField,
    Field,
    ForeignKeyField,
    IntegerField,
    Model,
    TextField,
)

db = DatabaseProxy()
IN_ORDER = "1970-01-01T00:00:00.000000Z"  # see Delivery


def stored_time(moment: datetime) -> str:
    """RFC 3339 text of one fixed width, so that text order is time order. Raises ValueError without a zone."""
    if moment.tzinfo is not UTC:
        if moment.tzinfo is None:
            raise ValueError("a time without a zone cannot be stored")
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


def read_time(value: Any) -> datetime | None:
    """A moment in UTC from what the database gives."""
    if value is None:
        return None
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    if moment.tzinfo is UTC:
        return moment
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class UtcField(Field):
    """A moment in UTC."""

    field_type = "TIMESTAMPTZ"

    def db_value(self, value: datetime | None) -> str | None:
        return None if value is None else stored_time(value)

    def python_value(self, value: Any) -> datetime | None:
        return read_time(value)


class Table(Model):
    class Meta:
        database = db
        legacy_table_names = False


class Webhook(Table):
    """An endpoint: where deliveries go, for which events, and how it has fared so far."""

    webhook_id = TextField(primary_key=True)
    url = TextField()
    events = TextField()  # a JSON array
    secret = TextField()
    team = TextField(null=True)
    created_at = UtcField()
    enabled = BooleanField(constraints=[SQL("DEFAULT TRUE")])
    total_calls = BigIntegerField(constraints=[SQL("DEFAULT 0")])
    failed_calls = BigIntegerField(constraints=[SQL("DEFAULT 0")])
    last_success = UtcField(null=True)
    last_failure = UtcField(null=True)
    description = TextField(null=True)
    headers = TextField(null=True)  # a JSON object
    updated_at = UtcField(null=True)
    previous_secret = TextField(null=True)
    previous_secret_expires_at = UtcField(null=True)
    earlier_secrets = TextField(
        null=True
    )  # a JSON array of [secret, expiry], oldest first: from before the previous one
    failing_since = UtcField(null=True)
    disabled_at = UtcField(null=True)
    disabled_reason = TextField(null=True)
    retry_schedule = TextField(null=True)
    rate_limit = DoubleField(null=True)
    ordered = BooleanField(null=True)

    class Meta:
        table_name = "webhooks"
        constraints = [
            SQL("CONSTRAINT webhooks_calls_not_negative CHECK (total_calls >= 0 AND failed_calls >= 0)"),
        ]


# Both end in the order of a listing, so that a page is one seek, whatever the size of the table.
Webhook.add_index(Webhook.team, Webhook.created_at, Webhook.webhook_id, name="idx_webhooks_team")
Webhook.add_index(Webhook.created_at, Webhook.webhook_id, name="idx_webhooks_created")
# The few in a rotation's overlap, so that the sweep finds secrets to erase, whatever the size of the table.
Webhook.add_index(
    Webhook.previous_secret_expires_at,
    where=SQL("previous_secret_expires_at IS NOT NULL"),
    name="idx_webhooks_overlap",
)
Webhook.add_index(Webhook.webhook_id, where=SQL("earlier_secrets IS NOT NULL"), name="idx_webhooks_earlier")


class Subscription(Table):
    """An event type, and a team ('' = any), that a webhook wants: derived from `webhooks`, in the same transaction."""

    event_type = TextField()
    team = TextField()
    webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", index=False)

    class Meta:
        table_name = "subscriptions"
        primary_key = CompositeKey("event_type", "team", "webhook")


Subscription.add_index(Subscription.webhook, name="idx_subscriptions_webhook")


class Event(Table):
    """Something that happened. `payload` is the very text that is signed and sent, on every attempt."""

    event_id = TextField(primary_key=True)
    event_type = TextField()
    payload = TextField()
    idempotency_key = TextField(null=True, unique=True)
    created_at = UtcField()

    class Meta:
        table_name = "events"


Event.add_index(Event.created_at, Event.event_id, name="idx_events_created")


class Status(StrEnum):
    """Where a delivery is. It leaves `pending` once, unless someone asks for it again."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Delivery(Table):
    """One event on its way to one webhook, with its latest attempt.

    While pending, `next_attempt_at` is when it is due, or, while `leased`, when whoever sends it has lost it. For a
    webhook with strict order it is IN_ORDER, so that the index gives the oldest first, and the lane holds the time.
    """

    delivery_id = BigAutoField()
    webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", index=False)
    event = ForeignKeyField(Event, column_name="event_id", on_delete="CASCADE", index=False)
    status = TextField(constraints=[SQL("DEFAULT 'pending'")])
    leased = BooleanField(constraints=[SQL("DEFAULT FALSE")])
    reason = TextField(null=True)  # why it ended other than by its last attempt
    attempts = IntegerField(constraints=[SQL("DEFAULT 0")])
    attempts_before = IntegerField(constraints=[SQL("DEFAULT 0")])  # it was asked for again: the schedule starts anew
    next_attempt_at = UtcField(null=True)
    created_at = UtcField()
    finished_at = UtcField(null=True)
    last_started_at = UtcField(null=True)
    last_duration_ms = IntegerField(null=True)
    last_status_code = IntegerField(null=True)
    last_error = TextField(null=True)
    last_response = TextField(null=True)

    class Meta:
        table_name = "deliveries"
        constraints = [
            SQL("CONSTRAINT deliveries_status CHECK (status IN ('pending', 'succeeded', 'failed', 'cancelled'))"),
            SQL("CONSTRAINT deliveries_due CHECK (status <> 'pending' OR next_attempt_at IS NOT NULL)"),
        ]


# An endpoint gets an event once. The event comes first: new rows then go to the end of the index.
Delivery.add_index(Delivery.event, Delivery.webhook, unique=True, name="idx_deliveries_event")
Delivery.add_index(Delivery.webhook, Delivery.delivery_id, name="idx_deliveries_webhook")
Delivery.add_index(
    Delivery.webhook, Delivery.next_attempt_at, where=SQL("status = 'pending'"), name="idx_deliveries_pending"
)
# What is being made in order, at most one of a webhook: to know whether there is one, however many wait behind it.
Delivery.add_index(
    Delivery.webhook,
    Delivery.next_attempt_at,
    where=SQL(f"status = 'pending' AND leased AND next_attempt_at = '{IN_ORDER}'"),
    name="idx_deliveries_made",
)


class Attempt(Table):
    """An attempt before a delivery's latest one; most deliveries never have one."""

    delivery = ForeignKeyField(Delivery, column_name="delivery_id", on_delete="CASCADE", index=False)
    number = IntegerField()
    started_at = UtcField()
    duration_ms = IntegerField()
    status_code = IntegerField(null=True)
    error = TextField(null=True)
    response = TextField(null=True)

    class Meta:
        table_name = "attempts"
        primary_key = CompositeKey("delivery", "number")


class Lane(Table):
    """The queue of one webhook, there while something of it waits.

    `due_at`: when a worker looks next; may be early, never late. `open_at`: not before this, because the endpoint
    fails, has a rate limit, or is being tried by someone. `failures`: attempts failed in a row.
    """

    webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", primary_key=True)
    due_at = UtcField()
    open_at = UtcField(null=True)
    failures = IntegerField(constraints=[SQL("DEFAULT 0")])

    class Meta:
        table_name = "lanes"


Lane.add_index(Lane.due_at, name="idx_lanes_due")


class Import(Table):
    """The entry of a webhook as it was last imported, so that the next one takes over only what changed in the file.

    It outlives the webhook, so that one that was deleted here does not come back.
    """

    webhook_id = TextField(primary_key=True)
    entry = TextField()  # a JSON object of the file's fields, the secret as a digest
    imported_at = UtcField()

    class Meta:
        table_name = "imports"


class Replay(Table):
    """Delivering again what a webhook missed: carried out by workers, in steps."""

    replay_id = TextField(primary_key=True)  # "rpl_" and a UUIDv7
    webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", index=False)
    since = UtcField()
    until = UtcField()
    statuses = TextField()  # failed | all
    state = TextField(constraints=[SQL("DEFAULT 'running'")])  # running | finished | cancelled
    cursor = TextField()  # JSON: the time and id of the last event that was looked at
    deliveries = BigIntegerField(constraints=[SQL("DEFAULT 0")])  # made due so far
    created_at = UtcField()
    finished_at = UtcField(null=True)
    reason = TextField(null=True)  # why it was cancelled

    class Meta:
        table_name = "replays"
        constraints = [SQL("CONSTRAINT replays_state CHECK (state IN ('running', 'finished', 'cancelled'))")]


Replay.add_index(Replay.webhook, Replay.replay_id, name="idx_replays_webhook")
Replay.add_index(Replay.replay_id, where=SQL("state = 'running'"), name="idx_replays_running")


class Heartbeat(Table):
    """A worker that delivers, and when it last wrote that it is alive."""

    worker_id = TextField(primary_key=True)
    host = TextField()
    started_at = UtcField()
    beat_at = UtcField()

    class Meta:
        table_name = "workers"


TABLES: list[type[Model]] = [Webhook, Subscription, Event, Delivery, Attempt, Lane, Import, Replay, Heartbeat]
