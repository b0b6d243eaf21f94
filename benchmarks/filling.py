"""Filling databases: webhooks by the million, and deliveries that ended long ago."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime

from peewee import Database

from benchmarks.delivering import DATA
from hookline.store.pool import is_postgres
from models import stored_time

SERIES = "(WITH RECURSIVE t(n) AS (SELECT {0} + 1 UNION ALL SELECT n + 1 FROM t WHERE n < {1}) SELECT n FROM t) AS s"
WEBHOOKS = """
    INSERT INTO webhooks (webhook_id, url, events, secret, team, created_at)
    SELECT lpad(n::text, 36, '0'), 'https://example.com/', '["goal"]', 'a-secret-of-enough-characters',
           CASE WHEN n < 10 THEN 't' ELSE 'team' || n % 1000 END, now() FROM generate_series(0, {size} - 1) n"""
SUBSCRIPTIONS = """
    INSERT INTO subscriptions (event_type, team, webhook_id)
    SELECT 'goal', team, webhook_id FROM webhooks ORDER BY team, webhook_id"""


def remember(db: Database, rows: int, at: datetime) -> None:
    """Insert this many deliveries that succeeded at that time, ten of each event, over all webhooks."""
    series = "generate_series({0} + 1, {1}) AS s(n)" if is_postgres(db) else SERIES
    event_id = "'evt_' || lpad(n::text, 36, '0')" if is_postgres(db) else "printf('evt_%036d', n)"
    now = f"'{stored_time(at)}'" + ("::timestamptz" if is_postgres(db) else "")
    payload = json.dumps({**DATA, "event_type": "goal", "timestamp": "2026-11-23T14:30:01"})
    statements: list[Callable[[int, int], str]] = [
        lambda first, last: (
            f"""
            INSERT INTO events (event_id, event_type, payload, created_at)
            SELECT {event_id}, 'goal', '{payload}', {now} FROM {series.format(first, last)}"""
        ),
        lambda first, last: (
            f"""
            INSERT INTO deliveries (webhook_id, event_id, status, attempts, created_at, finished_at, last_started_at,
                                    last_duration_ms, last_status_code, last_response)
            SELECT w.webhook_id, {event_id}, 'succeeded', 1, {now}, {now}, {now}, 5, 200, 'ok'
            FROM {series.format(first, last)}
            CROSS JOIN (SELECT webhook_id, row_number() OVER (ORDER BY webhook_id) - 1 AS position FROM webhooks) w
            WHERE w.position - w.position / 100 * 100 = n - n / 100 * 100"""
        ),
    ]
    total, step = rows // 10, 100_000
    with db.connection_context():
        if is_postgres(db):
            db.execute_sql("SET statement_timeout = 0")
            db.execute_sql("SET session_replication_role = replica")  # foreign keys are right as they are
        for first in range(0, total, step):
            for statement in statements:
                db.execute_sql(statement(first, min(first + step, total)))
        if is_postgres(db):
            db.execute_sql("RESET session_replication_role")
            db.execute_sql("VACUUM ANALYZE")
