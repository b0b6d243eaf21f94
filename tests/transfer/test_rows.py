"""Rows in one form: every table, every value, and those that another program has spoilt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import models
from hookline import WebhookManager
from hookline.errors import Conflict, Invalid
from hookline.transfer import databases, rows
from tests.conftest import SECRET
from tests.transfer.copying import contents, fill, opened, source_and_target


def test_every_table_is_copied() -> None:
    assert {table.name for table in rows.TABLES} == {
        str(model._meta.table_name) for model in models.TABLES if model is not models.Heartbeat
    }


def test_a_text_that_postgres_cannot_hold_is_named(tmp_path: Path) -> None:
    with source_and_target("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        webhook_id = WebhookManager(db=source).register("http://example.com/", ["goal"], SECRET)
        with source.connection_context():
            source.execute_sql("UPDATE webhooks SET description = ?", ("a\0b",))
        with pytest.raises(Invalid, match=f"webhooks {webhook_id}: description has a NUL character"):
            databases.copy(source, target)
        assert contents(target)["webhooks"] == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("UPDATE events SET payload = x'ff'", r"events evt_\S+: payload is not text"),
        (
            "INSERT INTO webhooks (webhook_id, url, events, secret, created_at) "
            "VALUES (x'ff', 'u', '[]', 's', '2026-01-01T00:00:00Z')",
            "webhooks b.*: webhook_id is not text",
        ),
        ("UPDATE events SET payload = CAST(x'ff' AS TEXT)", "events: a text of the .* rows behind the first is broken"),
        ("UPDATE deliveries SET attempts = 'many'", "deliveries 1 to .*cannot store one of these rows: .*many"),
        ("UPDATE deliveries SET attempts = 99999999999", "deliveries 1 to .*cannot store one of these rows"),
        ("UPDATE webhooks SET created_at = 'yesterday'", "webhooks .*: created_at is not a time"),
        ("UPDATE webhooks SET created_at = '0001-01-01T00:00:00+02:00'", "webhooks .*: created_at is not a time"),
        (f"UPDATE webhooks SET team = '{os.urandom(4000).hex()}'", "webhooks .*cannot store one of these rows"),
    ],
)
def test_a_value_that_another_program_has_spoilt_is_named(tmp_path: Path, damage: str, named: str) -> None:
    with source_and_target("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        with source.connection_context():
            source.execute_sql(damage)
        with pytest.raises(Invalid, match=named):
            databases.copy(source, target)


def test_a_row_that_refers_to_a_missing_one_is_named(tmp_path: Path) -> None:
    with source_and_target("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        with source.connection_context():
            source.execute_sql("PRAGMA foreign_keys = 0")
            source.execute_sql("DELETE FROM webhooks")
            source.execute_sql("PRAGMA foreign_keys = 1")
        with pytest.raises(Conflict, match=r"subscriptions: .*what it belongs to is missing"):
            databases.copy(source, target)
