"""Adopting the replaced service's SQLite file: all its rows, or the file as it was."""

from __future__ import annotations

import sqlite3

import pytest

from hookline import WebhookManager
from hookline.store.open import open_database
from tests.conftest import ROOT, manage
from tests.databases import Place
from tests.store.connections import rows

NAMES = sorted(path.stem for path in (ROOT / "migrations").glob("0*.py"))


REVERTED = "".join(f"reverted {name}\n" for name in reversed(NAMES))


LEGACY = (
    "webhook_id, url, events, secret, team, created_at, total_calls, failed_calls, last_success, last_failure, enabled"
)


def dump(place: Place) -> list[str]:
    db = sqlite3.connect(place.file)
    try:
        return list(db.iterdump())
    finally:
        db.close()


def test_the_replaced_services_file_is_adopted_with_all_its_rows(adopted: Place) -> None:
    before = rows(adopted, f"SELECT {LEGACY} FROM webhooks ORDER BY webhook_id")
    assert manage(adopted, "migrate", "up").returncode == 0
    assert manage(adopted, "migrate", "diff").returncode == 0
    after = rows(adopted, f"SELECT {LEGACY} FROM webhooks ORDER BY webhook_id")
    assert len(after) == 26
    for old, new in zip(before, after, strict=True):
        assert new[:5] == old[:5]
        assert new[5] == old[5].replace(" ", "T") + "Z"
        assert new[6:8] == old[6:8]
        assert new[8:10] == tuple(time and time + "Z" for time in old[8:10])
        assert new[10] == old[10]
    indexes = {name for (name,) in rows(adopted, "SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert "idx_webhooks_team" in indexes
    assert "ix_webhooks_team" not in indexes
    assert rows(adopted, "SELECT count(*) FROM subscriptions") == rows(
        adopted, "SELECT count(*) FROM webhooks, json_each(events)"
    )


def test_up_down_up_keeps_the_rows_and_down_gives_the_old_table_back(adopted: Place) -> None:
    select = f"SELECT {LEGACY} FROM webhooks ORDER BY webhook_id"
    columns = "SELECT name FROM pragma_table_info('webhooks') ORDER BY name"
    before, shape = rows(adopted, select), rows(adopted, columns)
    manage(adopted, "migrate", "up")
    first = rows(adopted, "SELECT * FROM webhooks ORDER BY webhook_id")
    assert manage(adopted, "migrate", "down", "0001_webhooks").stdout == REVERTED
    assert rows(adopted, select) == before
    assert rows(adopted, columns) == shape
    assert rows(adopted, "SELECT name FROM sqlite_master WHERE name = 'ix_webhooks_team'")
    manage(adopted, "migrate", "up")
    assert rows(adopted, "SELECT * FROM webhooks ORDER BY webhook_id") == first


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("UPDATE webhooks SET events = 'nope' WHERE team = 'ne'", "events"),
        ("UPDATE webhooks SET last_success = 'yesterday' WHERE team = 'sf'", "last_success is not a time"),
        ("UPDATE webhooks SET last_failure = 5", "last_failure is not a time"),
        ("UPDATE webhooks SET created_at = '0001-01-01T00:00:00+05:00' WHERE team = 'sf'", "created_at is not a time"),
        ("UPDATE webhooks SET created_at = x'00'", "created_at is not a time"),
        ("UPDATE webhooks SET total_calls = 'many'", "total_calls is not a whole number"),
        ("UPDATE webhooks SET failed_calls = -1", "failed_calls is not a whole number"),
        ("UPDATE webhooks SET url = x'00'", "url is not a text"),
        ("ALTER TABLE webhooks ADD COLUMN colour", "colour"),
    ],
)
def test_a_file_that_cannot_be_adopted_is_left_as_it_was(adopted: Place, damage: str, named: str) -> None:
    db = sqlite3.connect(adopted.file)
    with db:
        db.execute(damage)
    db.close()
    before = dump(adopted)
    failed = manage(adopted, "migrate", "up")
    assert failed.returncode == 1
    assert named in failed.stderr
    assert "your-secure-secret" not in failed.stderr
    assert "Traceback" not in failed.stderr
    assert dump(adopted) == before


def test_adopting_empty_times_and_early_years_leaves_listings_whole(adopted: Place) -> None:
    old = sqlite3.connect(adopted.file)
    with old:
        old.execute("UPDATE webhooks SET last_failure = '', last_success = '0900-01-02T03:04:05.000006'")
        old.execute("UPDATE webhooks SET created_at = '' WHERE team = 'ne'")
        old.execute("UPDATE webhooks SET created_at = '0900-01-01 00:00:00' WHERE team = 'sf'")
        old.execute(f"UPDATE webhooks SET total_calls = {2**40}")
    old.close()
    assert manage(adopted, "migrate", "up").returncode == 0
    db = open_database(adopted.url)
    listed = WebhookManager(db=db).get_all()
    assert len(listed) == 26
    assert {one["last_failure"] for one in listed} == {None}
    assert {one["last_success"] for one in listed} == {"0900-01-02T03:04:05.000006"}
    assert {one["total_calls"] for one in listed} == {2**40}
    assert "0900-01-01T00:00:00" in {one["created_at"] for one in listed}
    times = rows(adopted, "SELECT created_at FROM webhooks UNION SELECT last_success FROM webhooks")
    assert {len(time) for (time,) in times} == {27}
    db.close_all()  # type: ignore[attr-defined]


def test_a_stranger_in_an_adopted_row_does_not_drive_the_terminal(adopted: Place) -> None:
    old = sqlite3.connect(adopted.file)
    with old:
        old.execute(
            "UPDATE webhooks SET webhook_id = char(27) || '[2J', last_failure = 'never' "
            "WHERE webhook_id = (SELECT max(webhook_id) FROM webhooks)"
        )
    old.close()
    failed = manage(adopted, "migrate", "up")
    assert r"webhook \x1b[2J: last_failure is not a time" in failed.stderr
    assert "\x1b" not in failed.stderr


def test_an_adopted_text_that_is_not_utf_8_is_refused_without_quoting_it(adopted: Place) -> None:
    old = sqlite3.connect(adopted.file)
    with old:
        old.execute("UPDATE webhooks SET secret = CAST(x'ff' || secret AS TEXT)")
    old.close()
    failed = manage(adopted, "migrate", "up")
    assert "rolled back: the table webhooks has a text that is not UTF-8" in failed.stderr
    assert "your-secure-secret" not in failed.stderr
    assert rows(adopted, "SELECT count(*) FROM webhooks") == [(26,)]
