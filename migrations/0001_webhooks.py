"""The tables `webhooks` and `subscriptions`, or the adoption of the replaced service's own `webhooks`.

Adopting keeps every row, brings times to UTC text and fills what that service left null. `down` goes back to the
replaced service's table with all rows (what it has no column for is dropped), so that it can be started again.
"""

import json
import sqlite3
from datetime import UTC, datetime

from peewee import (
    SQL,
    BigIntegerField,
    BooleanField,
    CompositeKey,
    DoubleField,
    Field,
    ForeignKeyField,
    IntegerField,
    Model,
    SqliteDatabase,
    TextField,
    chunked,
)

LEGACY_COLUMNS = [
    "webhook_id",
    "url",
    "events",
    "secret",
    "team",
    "created_at",
    "total_calls",
    "failed_calls",
    "last_success",
    "last_failure",
    "enabled",
]
LEGACY_TABLE = """
CREATE TABLE webhooks (
    webhook_id VARCHAR NOT NULL, url VARCHAR NOT NULL, events VARCHAR NOT NULL, secret VARCHAR NOT NULL,
    team VARCHAR, created_at TIMESTAMP, total_calls {count}, failed_calls {count},
    last_success VARCHAR, last_failure VARCHAR, enabled BOOLEAN, PRIMARY KEY (webhook_id))
"""


class UtcField(Field):
    field_type = "TIMESTAMPTZ"


def tables(db):
    # SQLite's INTEGER has 64 bits, PostgreSQL's 32.
    Count = IntegerField if isinstance(db, SqliteDatabase) else BigIntegerField

    class Webhook(Model):
        webhook_id = TextField(primary_key=True)
        url = TextField()
        events = TextField()
        secret = TextField()
        team = TextField(null=True)
        created_at = UtcField()
        enabled = BooleanField(constraints=[SQL("DEFAULT TRUE")])
        total_calls = Count(constraints=[SQL("DEFAULT 0")])
        failed_calls = Count(constraints=[SQL("DEFAULT 0")])
        last_success = UtcField(null=True)
        last_failure = UtcField(null=True)
        description = TextField(null=True)
        headers = TextField(null=True)
        updated_at = UtcField(null=True)
        previous_secret = TextField(null=True)
        previous_secret_expires_at = UtcField(null=True)
        failing_since = UtcField(null=True)
        disabled_reason = TextField(null=True)
        retry_schedule = TextField(null=True)
        rate_limit = DoubleField(null=True)
        ordered = BooleanField(null=True)

        class Meta:
            database = db
            table_name = "webhooks"
            constraints = [
                SQL("CONSTRAINT webhooks_calls_not_negative CHECK (total_calls >= 0 AND failed_calls >= 0)"),
            ]

    Webhook.add_index(Webhook.team, Webhook.created_at, Webhook.webhook_id, name="idx_webhooks_team")
    Webhook.add_index(Webhook.created_at, Webhook.webhook_id, name="idx_webhooks_created")

    class Subscription(Model):
        event_type = TextField()
        team = TextField()
        webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", index=False)

        class Meta:
            database = db
            table_name = "subscriptions"
            primary_key = CompositeKey("event_type", "team", "webhook")
            without_rowid = isinstance(db, SqliteDatabase)

    Subscription.add_index(Subscription.webhook, name="idx_subscriptions_webhook")
    return Webhook, Subscription


def up(migrator, db):
    legacy = take_legacy_rows(db) if db.table_exists("webhooks") else []
    webhook, subscription = tables(db)
    db.create_tables([webhook, subscription], safe=False)
    for rows in chunked(legacy, 500):
        webhook.insert_many(rows).execute()
    for rows in chunked(subscriptions_of(legacy), 5000):
        subscription.insert_many(rows).execute()


def down(migrator, db):
    rows = read_rows(db)
    db.execute_sql("DROP TABLE subscriptions")
    db.execute_sql("DROP TABLE webhooks")
    if not rows:
        return
    # SQLite's INTEGER has 64 bits, PostgreSQL's 32.
    db.execute_sql(LEGACY_TABLE.format(count="INTEGER" if isinstance(db, SqliteDatabase) else "BIGINT"))
    db.execute_sql("CREATE INDEX ix_webhooks_team ON webhooks (team)")
    slots = ", ".join([db.param] * len(LEGACY_COLUMNS))
    for row in rows:
        row["created_at"] = legacy_time(row["created_at"], " ")
        row["last_success"] = legacy_time(row["last_success"], "T")
        row["last_failure"] = legacy_time(row["last_failure"], "T")
        values = [row[name] for name in LEGACY_COLUMNS]
        db.execute_sql(f"INSERT INTO webhooks ({', '.join(LEGACY_COLUMNS)}) VALUES ({slots})", values)


def take_legacy_rows(db):
    """All rows of the replaced service's table, as ours; it is dropped. Refuses a table that is not quite that one."""
    found = {column.name for column in db.get_columns("webhooks")}
    missing, unknown = set(LEGACY_COLUMNS) - found, found - set(LEGACY_COLUMNS)
    if missing or unknown:
        raise ValueError(
            "the table webhooks is not the replaced service's: "
            f"missing columns {sorted(missing)}, unknown columns {sorted(unknown)}"
        )
    rows = [adopted(row) for row in read_rows(db)]
    db.execute_sql("DROP TABLE webhooks")
    return rows


def read_rows(db):
    cursor = db.execute_sql(f"SELECT {', '.join(LEGACY_COLUMNS)} FROM webhooks ORDER BY created_at, webhook_id")
    try:
        rows = cursor.fetchall()
    except sqlite3.OperationalError:  # it would quote the text
        raise ValueError("the table webhooks has a text that is not UTF-8") from None
    return [dict(zip(LEGACY_COLUMNS, row, strict=True)) for row in rows]


def adopted(row):
    """A legacy row as ours. Raises ValueError that names the row and column, never a value."""
    row = dict(row)
    for name in ("webhook_id", "url", "events", "secret"):
        require(isinstance(row[name], str), row, name, "a text")
    require(row["team"] is None or isinstance(row["team"], str), row, "team", "a text")
    for name in ("created_at", "last_success", "last_failure"):
        try:
            row[name] = None if row[name] in (None, "") else utc_text(row[name])
        except (ValueError, TypeError, OverflowError):
            require(False, row, name, "a time")
    row["created_at"] = row["created_at"] or utc_text(datetime.now(UTC))
    for name in ("total_calls", "failed_calls"):
        row[name] = 0 if row[name] is None else row[name]
        require(isinstance(row[name], int) and row[name] >= 0, row, name, "a whole number from 0 on")
    row["enabled"] = bool(row["enabled"])  # null was never called by the replaced service either
    return row


def require(holds, row, name, what):
    if not holds:
        raise ValueError(f"webhook {row['webhook_id']}: {name} is not {what}") from None


def subscriptions_of(rows):
    for row in rows:
        try:
            events = json.loads(row["events"])
        except (ValueError, RecursionError):
            events = None
        if not isinstance(events, list) or not all(isinstance(event, str) for event in events):
            raise ValueError(f"webhook {row['webhook_id']}: events is not a JSON array of strings")
        for event in dict.fromkeys(events):
            yield {"event_type": event, "team": row["team"] or "", "webhook": row["webhook_id"]}


def moment(value):
    value = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_text(value):
    return moment(value).isoformat(timespec="microseconds")[:26] + "Z"


def legacy_time(value, separator):
    return value and moment(value).replace(tzinfo=None).isoformat(sep=separator, timespec="microseconds")
