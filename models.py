"""The tables: Peewee models, their constraints and indexes. No policy here.

`db` is bound once, by whoever assembles the program (`app.py`, `manage.py`, a `WebhookManager`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from peewee import (
    SQL,
    BooleanField,
    CompositeKey,
    DatabaseProxy,
    Field,
    FloatField,
    ForeignKeyField,
    IntegerField,
    Model,
    TextField,
)

db = DatabaseProxy()


def stored_time(moment: datetime) -> str:
    """RFC 3339 text of one fixed width, so that text order is time order. Raises ValueError without a zone."""
    if moment.tzinfo is None:
        raise ValueError("a time without a zone cannot be stored")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


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
    total_calls = IntegerField(constraints=[SQL("DEFAULT 0")])
    failed_calls = IntegerField(constraints=[SQL("DEFAULT 0")])
    last_success = UtcField(null=True)
    last_failure = UtcField(null=True)
    description = TextField(null=True)
    headers = TextField(null=True)  # a JSON object
    updated_at = UtcField(null=True)
    previous_secret = TextField(null=True)
    previous_secret_expires_at = UtcField(null=True)
    failing_since = UtcField(null=True)
    disabled_reason = TextField(null=True)
    retry_schedule = TextField(null=True)
    rate_limit = FloatField(null=True)
    ordered = BooleanField(null=True)

    class Meta:
        table_name = "webhooks"
        constraints = [
            SQL("CONSTRAINT webhooks_calls_not_negative CHECK (total_calls >= 0 AND failed_calls >= 0)"),
        ]


# Both end in the order of a listing, so that a page is one seek, whatever the size of the table.
Webhook.add_index(Webhook.team, Webhook.created_at, Webhook.webhook_id, name="idx_webhooks_team")
Webhook.add_index(Webhook.created_at, Webhook.webhook_id, name="idx_webhooks_created")


class Subscription(Table):
    """Which webhook wants which event of which team ('' = any): derived from `webhooks`, in the same transaction."""

    event_type = TextField()
    team = TextField()
    webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", index=False)

    class Meta:
        table_name = "subscriptions"
        primary_key = CompositeKey("event_type", "team", "webhook")
        without_rowid = True


Subscription.add_index(Subscription.webhook, name="idx_subscriptions_webhook")

TABLES: list[type[Model]] = [Webhook, Subscription]
