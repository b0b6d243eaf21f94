"""Remove orphans: rows whose webhook, event or delivery is gone.

Tools that do not enforce SQLite's foreign keys leave them behind; PostgreSQL always enforces them. Sweeps look through
every table in short steps, a few keys each time.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from peewee import Database

from hookline.store import sql
from hookline.store.pool import is_postgres
from hookline.store.storage import Storage
from hookline.store.units import connected

log = logging.getLogger("hookline")

KEYS = 1000  # looked at in one step
ROWS = 500  # deleted in one unit of work


class Reference(NamedTuple):
    """A column that points at the rows of another table. An index of its own table begins with it."""

    table: str
    column: str
    parent: str
    primary_key: str  # of its own table
    least: Any = ""  # below every value


REFERENCES = (
    Reference("lanes", "webhook_id", "webhooks", "webhook_id"),
    Reference("subscriptions", "webhook_id", "webhooks", "event_type, team, webhook_id"),
    Reference("deliveries", "webhook_id", "webhooks", "delivery_id"),
    Reference("deliveries", "event_id", "events", "delivery_id"),
    Reference("attempts", "delivery_id", "deliveries", "delivery_id, number", 0),
    Reference("replays", "webhook_id", "webhooks", "replay_id"),
)
Positions = dict[Reference, Any]  # the value behind which the next search goes on


async def sweep(storage: Storage, positions: Positions) -> None:
    """Search the next keys of every table from its position, which moves on; delete orphans. Raises Unavailable."""
    if is_postgres(storage.db):
        return
    for reference in REFERENCES:
        keys, positions[reference] = await storage.scan(find, reference, positions.get(reference, reference.least))
        removed = batch = await storage.write(remove, reference, keys) if keys else 0
        while batch == ROWS:
            removed += (batch := await storage.write(remove, reference, keys))
        if removed:
            table, column, parent, *_ = reference
            log.warning("removed %s rows of %s whose %s is not in %s", removed, table, column, parent)


def find(db: Database, reference: Reference, after: Any) -> tuple[list[Any], Any]:
    """Of the next KEYS values behind `after` those that point nowhere; and the value to go on from.

    Skips along the index from value to value. Raises Unavailable.
    """
    table, column, parent, _, least = reference
    statement = f"""
        WITH RECURSIVE used (key, position) AS (
            SELECT (SELECT min({column}) FROM {table} WHERE {column} > {sql.param(db, "after")}), 1
            UNION ALL
            SELECT (SELECT min({column}) FROM {table} WHERE {column} > used.key), position + 1 FROM used
            WHERE key IS NOT NULL AND position < {KEYS}
        )
        SELECT key, NOT EXISTS (SELECT 1 FROM {parent} p WHERE p.{column} = used.key)
        FROM used WHERE key IS NOT NULL ORDER BY position"""
    with connected(db):
        rows = db.execute_sql(statement, {"after": after}).fetchall()
    last, _ = rows[-1] if len(rows) == KEYS else (least, None)
    return [key for key, is_orphan in rows if is_orphan], last


def remove(db: Database, reference: Reference, keys: list[Any]) -> int:
    """Delete at most ROWS rows that have these values, if they still point nowhere. Inside a unit of work."""
    table, column, parent, primary_key, _ = reference
    statement = f"""
        DELETE FROM {table} WHERE ({primary_key}) IN (
            SELECT {primary_key} FROM {table} t
            WHERE t.{column} IN (SELECT id FROM {sql.values(db, "keys", "id")})
                  AND NOT EXISTS (SELECT 1 FROM {parent} p WHERE p.{column} = t.{column})
            LIMIT {ROWS})"""
    return int(db.execute_sql(statement, {"keys": sql.encoded_ids(keys)}).rowcount)
