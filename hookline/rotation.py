"""Secrets that a rotation still keeps: which ones sign, and which have ended and are erased.

A webhook's `previous_secret` is the newest of them. `earlier_secrets` is a JSON array of [secret, expiry] of those from
before it, oldest first, where several rotations overlap.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from peewee import Database

from hookline import clock
from hookline.errors import Conflict
from hookline.store import locks, sql
from hookline.store.pool import is_postgres
from hookline.store.storage import Storage
from hookline.store.units import connected
from hookline.tables import read_time, stored_time

MAX_KEPT = 10  # secrets that sign beside the current one
WEBHOOKS = 500  # erased from in one unit of work

COLUMNS = ("previous_secret", "previous_secret_expires_at", "earlier_secrets")

Kept = tuple[str, datetime]  # a secret, and when it expires


def kept(previous: str | None, expires: Any, earlier: str | None, now: datetime) -> list[Kept]:
    """The secrets beside the current one that have not expired, oldest first; from the three columns."""
    if previous is None:
        return []
    found = [(secret, read_time(until)) for secret, until in [*json.loads(earlier or "[]"), (previous, expires)]]
    return [(secret, until) for secret, until in found if until is not None and until > now]


def columns(secrets: Sequence[Kept]) -> dict[str, Any]:
    """The three columns that keep these."""
    if not secrets:
        return dict.fromkeys(COLUMNS)
    *earlier, (previous, expires) = secrets
    texts = [(secret, stored_time(until)) for secret, until in earlier]
    return dict(zip(COLUMNS, (previous, expires, json.dumps(texts) if texts else None), strict=True))


def rotated(db: Database, webhook_id: str, secret: str, expires: datetime | None) -> dict[str, Any] | None:
    """The columns after a rotation to `secret`, where the current one ends at `expires`; None if there is no webhook.

    Without `expires` nothing is kept. Raises Conflict if too many are kept already.
    """
    locks.lock_webhooks(db, [webhook_id])
    select = f"SELECT secret, {', '.join(COLUMNS)} FROM webhooks WHERE webhook_id = {db.param}"
    row = db.execute_sql(select, (webhook_id,)).fetchone()
    if row is None:
        return None
    if expires is None:
        return {"secret": secret, **columns([])}
    current, previous, until, earlier = row
    secrets = [*kept(previous, until, earlier, clock.now()), (current, expires)]
    secrets = [one for one in secrets if one[0] != secret]
    if len(secrets) > MAX_KEPT:
        raise Conflict(f"{MAX_KEPT} earlier secrets are still valid: wait until one expires, or rotate with no overlap")
    return {"secret": secret, **columns(secrets)}


async def erase_all(storage: Storage) -> None:
    """Erase what has expired, in short steps. Raises Unavailable."""
    erased = WEBHOOKS
    while erased == WEBHOOKS:
        found = await storage.scan(ended)
        erased = await storage.write(erase, found) if found else 0


def ended(db: Database) -> list[str]:
    """Some of the webhooks that hold a secret which has expired. Raises Unavailable."""
    each, expiry = "json_each(w.earlier_secrets)", "json_extract(value, '$[1]')"
    if is_postgres(db):
        each, expiry = "json_array_elements(w.earlier_secrets::json)", "value ->> 1"
    statement = f"""
        SELECT webhook_id FROM webhooks WHERE previous_secret_expires_at <= {sql.moment(db)}
        UNION ALL
        SELECT webhook_id FROM webhooks w
        WHERE earlier_secrets IS NOT NULL AND EXISTS (SELECT 1 FROM {each} WHERE {expiry} <= {db.param})
        LIMIT {WEBHOOKS}"""
    now = stored_time(clock.now())
    with connected(db):
        return [row[0] for row in db.execute_sql(statement, (now, now)).fetchall()]


def erase(db: Database, webhook_ids: Sequence[str]) -> int:
    """Erase the expired secrets of these webhooks, but of those that somebody else holds; returns of how many.

    Inside a unit of work.
    """
    now = clock.now()
    free = set(webhook_ids) - locks.lock_webhooks(db, set(webhook_ids), skip_blocked=True)
    select = f"SELECT webhook_id, {', '.join(COLUMNS)} FROM webhooks WHERE webhook_id IN "
    rows = db.execute_sql(f"{select}(SELECT id FROM {sql.rows(db, 'id')})", (sql.ids(free),)).fetchall()
    left = []
    for webhook_id, previous, expires, earlier in rows:
        previous, expires, earlier = columns(kept(previous, expires, earlier, now)).values()
        left.append((webhook_id, previous, expires and stored_time(expires), earlier))
    given = sql.rows(db, "id", "previous", "expires timestamptz", "earlier")
    statement = f"""
        UPDATE webhooks SET previous_secret = given.previous, previous_secret_expires_at = given.expires,
               earlier_secrets = given.earlier
        FROM {given} WHERE webhook_id = given.id"""
    db.execute_sql(statement, (sql.parameter(left),))
    return len(left)
