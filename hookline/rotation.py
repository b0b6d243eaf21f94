"""Rotation: the old secrets that still sign beside the current one, and the erasure of those that have expired.

A webhook's `previous_secret` is the newest old one. `earlier_secrets` is a JSON array of [secret, expiry] of those from
before it, oldest first, where several rotations overlap.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

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

Kept = tuple[str, datetime]  # a secret, and when it expires


class OldSecrets(NamedTuple):
    """The columns of a webhook with its secrets from before rotations."""

    previous_secret: str | None = None
    previous_secret_expires_at: Any = None  # as the database gives it, or a datetime
    earlier_secrets: str | None = None

    def kept(self, now: datetime) -> list[Kept]:
        """The secrets beside the current one that have not expired, oldest first."""
        if self.previous_secret is None:
            return []
        newest = (self.previous_secret, self.previous_secret_expires_at)
        secrets = [(secret, read_time(until)) for secret, until in [*json.loads(self.earlier_secrets or "[]"), newest]]
        return [(secret, until) for secret, until in secrets if until is not None and until > now]


COLUMNS = ", ".join(OldSecrets._fields)


def of_kept(secrets: Sequence[Kept]) -> OldSecrets:
    """The columns that keep these secrets."""
    if not secrets:
        return OldSecrets()
    *earlier, (previous, expires) = secrets
    texts = [(secret, stored_time(until)) for secret, until in earlier]
    return OldSecrets(previous, expires, json.dumps(texts) if texts else None)


def rotated(db: Database, webhook_id: str, secret: str, expires: datetime | None) -> dict[str, Any] | None:
    """The columns after a rotation to `secret`, where the current one ends at `expires`; None if there is no webhook.

    Without `expires` no secret is kept. Raises Conflict if too many are kept already.
    """
    locks.lock_webhooks(db, [webhook_id])
    select = f"SELECT secret, {COLUMNS} FROM webhooks WHERE webhook_id = {sql.param(db, 'webhook_id')}"
    row = db.execute_sql(select, {"webhook_id": webhook_id}).fetchone()
    if row is None:
        return None
    if expires is None:
        return {"secret": secret, **of_kept([])._asdict()}
    current, *old = row
    secrets = [*OldSecrets(*old).kept(clock.now()), (current, expires)]
    secrets = [(old, until) for old, until in secrets if old != secret]
    if len(secrets) > MAX_KEPT:
        raise Conflict(f"{MAX_KEPT} earlier secrets are still valid: wait until one expires, or rotate with no overlap")
    return {"secret": secret, **of_kept(secrets)._asdict()}


async def erase_all(storage: Storage) -> None:
    """Erase all secrets that have expired, in short steps. Raises Unavailable."""
    erased = WEBHOOKS
    while erased == WEBHOOKS:
        webhook_ids = await storage.scan(expired)
        erased = await storage.write(erase, webhook_ids) if webhook_ids else 0


def expired(db: Database) -> list[str]:
    """Some of the webhooks that have a secret which has expired. Raises Unavailable."""
    each, expiry = "json_each(w.earlier_secrets)", "json_extract(value, '$[1]')"
    if is_postgres(db):
        each, expiry = "json_array_elements(w.earlier_secrets::json)", "(value ->> 1)::timestamptz"
    now = sql.time(db, "now")
    statement = f"""
        SELECT webhook_id FROM webhooks WHERE previous_secret_expires_at <= {now}
        UNION ALL
        SELECT webhook_id FROM webhooks w
        WHERE earlier_secrets IS NOT NULL AND EXISTS (SELECT 1 FROM {each} WHERE {expiry} <= {now})
        LIMIT {WEBHOOKS}"""
    with connected(db):
        rows = db.execute_sql(statement, {"now": stored_time(clock.now())}).fetchall()
    return [webhook_id for (webhook_id,) in rows]


def erase(db: Database, webhook_ids: Sequence[str]) -> int:
    """Erase the expired secrets of these webhooks, except those that another transaction has locked.

    Returns of how many webhooks. Inside a unit of work.
    """
    now = clock.now()
    free = set(webhook_ids) - locks.lock_webhooks(db, set(webhook_ids), skip_blocked=True)
    select = f"""
        SELECT webhook_id, {COLUMNS} FROM webhooks
        WHERE webhook_id IN (SELECT id FROM {sql.values(db, "webhook_ids", "id")})"""
    erased = []
    for row in db.execute_sql(select, {"webhook_ids": sql.encoded_ids(free)}).fetchall():
        webhook_id, *old = row
        left = of_kept(OldSecrets(*old).kept(now))
        expires = left.previous_secret_expires_at
        erased.append((webhook_id, *left._replace(previous_secret_expires_at=expires and stored_time(expires))))
    rows = sql.values(db, "erased", "id", "previous", "expires timestamptz", "earlier")
    update = f"""
        UPDATE webhooks SET previous_secret = erased.previous, previous_secret_expires_at = erased.expires,
               earlier_secrets = erased.earlier
        FROM {rows} WHERE webhook_id = erased.id"""
    db.execute_sql(update, {"erased": sql.encoded(erased)})
    return len(erased)
