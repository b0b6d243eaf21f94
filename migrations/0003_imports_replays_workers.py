"""What imports took over, replays, who delivers, earlier secrets of a rotation, and why a delivery ended.

Only additions that may be null: the release before this one goes on beside it.
"""

from peewee import SQL, BigIntegerField, Field, ForeignKeyField, Model, SqliteDatabase, TextField


class UtcField(Field):
    field_type = "TIMESTAMPTZ"


def tables(db):
    class Base(Model):
        class Meta:
            database = db
            legacy_table_names = False

    class Webhook(Base):
        webhook_id = TextField(primary_key=True)

        class Meta:
            table_name = "webhooks"

    class Import(Base):
        webhook_id = TextField(primary_key=True)  # no foreign key: what is deleted here is not imported again
        entry = TextField()
        imported_at = UtcField()

        class Meta:
            table_name = "imports"
            without_rowid = isinstance(db, SqliteDatabase)

    class Replay(Base):
        replay_id = TextField(primary_key=True)
        webhook = ForeignKeyField(Webhook, column_name="webhook_id", on_delete="CASCADE", index=False)
        since = UtcField()
        until = UtcField()
        statuses = TextField()
        state = TextField(constraints=[SQL("DEFAULT 'running'")])
        cursor = TextField()
        deliveries = BigIntegerField(constraints=[SQL("DEFAULT 0")])
        created_at = UtcField()
        finished_at = UtcField(null=True)
        reason = TextField(null=True)

        class Meta:
            table_name = "replays"
            constraints = [SQL("CONSTRAINT replays_state CHECK (state IN ('running', 'finished', 'cancelled'))")]

    Replay.add_index(Replay.webhook, Replay.replay_id, name="idx_replays_webhook")
    Replay.add_index(Replay.replay_id, where=SQL("state = 'running'"), name="idx_replays_running")

    class Worker(Base):
        worker_id = TextField(primary_key=True)
        host = TextField()
        started_at = UtcField()
        beat_at = UtcField()

        class Meta:
            table_name = "workers"

    return [Import, Replay, Worker]


OVERLAPS = {
    "idx_webhooks_overlap": "(previous_secret_expires_at) WHERE previous_secret_expires_at IS NOT NULL",
    "idx_webhooks_earlier": "(webhook_id) WHERE earlier_secrets IS NOT NULL",
}


# Of strict order: what is being made. And, on PostgreSQL, the order of those that wait: SQLite's index has it already.
MADE = """CREATE INDEX idx_deliveries_made ON deliveries (webhook_id, next_attempt_at)
    WHERE status = 'pending' AND leased AND next_attempt_at = '1970-01-01T00:00:00.000000Z'"""
WAITING = "CREATE INDEX idx_deliveries_pending ON deliveries ({columns}) WHERE status = 'pending'"


def order(db, columns):
    if not isinstance(db, SqliteDatabase):
        db.execute_sql("DROP INDEX idx_deliveries_pending")
        db.execute_sql(WAITING.format(columns=columns))


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("webhooks", "earlier_secrets", TextField(null=True)),
        migrator.add_column("deliveries", "reason", TextField(null=True)),
    )
    db.create_tables(tables(db), safe=False)
    for name, where in OVERLAPS.items():
        db.execute_sql(f"CREATE INDEX {name} ON webhooks {where}")
    db.execute_sql(MADE)
    order(db, "webhook_id, next_attempt_at, delivery_id")


def down(migrator, db):
    order(db, "webhook_id, next_attempt_at")
    db.execute_sql("DROP INDEX idx_deliveries_made")
    for name in OVERLAPS:
        db.execute_sql(f"DROP INDEX {name}")
    db.drop_tables(tables(db), safe=False)
    db.execute_sql("UPDATE deliveries SET last_error = reason WHERE last_error IS NULL AND reason IS NOT NULL")
    migrator.migrate(
        migrator.drop_column("deliveries", "reason"),
        migrator.drop_column("webhooks", "earlier_secrets"),
    )
