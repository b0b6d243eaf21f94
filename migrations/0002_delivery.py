"""Events, their deliveries and attempts, the lanes, and when a webhook was disabled."""

from peewee import (
    SQL,
    BigAutoField,
    BooleanField,
    CompositeKey,
    Field,
    ForeignKeyField,
    IntegerField,
    Model,
    NodeList,
    SqliteDatabase,
    TextField,
)


class UtcField(Field):
    field_type = "TIMESTAMPTZ"


def tables(db):
    class NeverReused(BigAutoField):
        """SQLite gives the id of a deleted newest row out again, unless told not to."""

        def ddl(self, ctx):
            column = super().ddl(ctx)
            return NodeList((column, SQL("AUTOINCREMENT"))) if isinstance(db, SqliteDatabase) else column

    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Webhook(Base):
        webhook_id = TextField(primary_key=True)

        class Meta:
            table_name = "webhooks"

    class Event(Base):
        event_id = TextField(primary_key=True)
        event_type = TextField()
        payload = TextField()
        idempotency_key = TextField(null=True, unique=True)
        created_at = UtcField()

        class Meta:
            table_name = "events"

    Event.add_index(Event.created_at, Event.event_id, name="idx_events_created")

    class Delivery(Base):
        delivery_id = NeverReused()
        webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", index=False)
        event = ForeignKeyField(Event, column_name="event_id", on_delete="CASCADE", index=False)
        status = TextField(constraints=[SQL("DEFAULT 'pending'")])
        leased = BooleanField(constraints=[SQL("DEFAULT FALSE")])
        attempts = IntegerField(constraints=[SQL("DEFAULT 0")])
        attempts_before = IntegerField(constraints=[SQL("DEFAULT 0")])
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

    pending = SQL("status = 'pending'")
    Delivery.add_index(Delivery.event, Delivery.webhook, unique=True, name="idx_deliveries_event")
    Delivery.add_index(Delivery.webhook, Delivery.delivery_id, name="idx_deliveries_webhook")
    Delivery.add_index(Delivery.webhook, Delivery.next_attempt_at, where=pending, name="idx_deliveries_pending")

    class Attempt(Base):
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

    class Lane(Base):
        webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", primary_key=True)
        due_at = UtcField()
        open_at = UtcField(null=True)
        failures = IntegerField(constraints=[SQL("DEFAULT 0")])

        class Meta:
            table_name = "lanes"

    Lane.add_index(Lane.due_at, name="idx_lanes_due")
    return [Event, Delivery, Attempt, Lane]


def up(migrator, db):
    migrator.migrate(migrator.add_column("webhooks", "disabled_at", UtcField(null=True)))
    db.create_tables(tables(db), safe=False)


def down(migrator, db):
    db.drop_tables(tables(db), safe=False)
    migrator.migrate(migrator.drop_column("webhooks", "disabled_at"))
