"""Migrations: up, down and up again, failing without a trace, and the plans of the hot queries."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock
from hookline.errors import Invalid
from hookline.store import pool, schema
from hookline.store.locks import exclusive
from hookline.store.open import open_database
from models import Attempt, Delivery, Event, Heartbeat, Import, Lane, Replay, Subscription, Webhook, stored_time
from tests import databases
from tests.conftest import DATA, ROOT, SECRET, environment, manage, only_postgres, only_sqlite
from tests.databases import Place, plan
from tests.store.connections import rows

NAMES = sorted(path.stem for path in (ROOT / "migrations").glob("0*.py"))


APPLIED = "".join(f"applied {name}\n" for name in NAMES)


REVERTED = "".join(f"reverted {name}\n" for name in reversed(NAMES))


REBUILD = """
from peewee import IntegerField

def up(migrator, db):
    migrator.migrate(migrator.add_column("webhooks", "weight", IntegerField(default=7)))

def down(migrator, db):
    migrator.migrate(migrator.drop_column("webhooks", "weight"))
"""


def scripts(folder: Path, **more: str) -> Path:
    """Our migrations, and more of the test's own."""
    directory = Path(shutil.copytree(ROOT / "migrations", folder / "migrations"))
    for name, text in more.items():
        (directory / f"{name.removeprefix('m')}.py").write_text(text)
    return directory


def test_the_commands_tell_what_they_did(empty: Place) -> None:
    assert "0001_webhooks  pending" in manage(empty, "migrate", "status").stdout
    assert manage(empty, "migrate", "diff").returncode == 1
    assert manage(empty, "migrate", "up").stdout == APPLIED
    assert manage(empty, "migrate", "up").stdout == "nothing to apply\n"
    assert "0001_webhooks  applied 2" in manage(empty, "migrate", "status").stdout
    agreed = manage(empty, "migrate", "diff")
    assert (agreed.returncode, agreed.stdout) == (0, "the database matches the models\n")
    assert manage(empty, "migrate", "down").stdout == f"reverted {NAMES[-1]}\n"
    assert manage(empty, "migrate", "down", "0001_webhooks").stdout == REVERTED.partition("\n")[2]
    assert manage(empty, "migrate", "down").stdout == "nothing to revert\n"
    wrong = manage(empty, "migrate", "up", "0009_nothing")
    assert wrong.returncode == 1
    assert "there is no migration 0009_nothing" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_create_writes_the_next_number(db: Database, tmp_path: Path) -> None:
    assert schema.create(db, "add colour", scripts(tmp_path)).name == f"{len(NAMES) + 1:04}_add_colour.py"


def test_a_migration_that_fails_half_way_leaves_the_database_as_it_was(
    db: Database, manager: WebhookManager, tmp_path: Path
) -> None:
    half = "def up(migrator, db):\n    db.execute_sql('CREATE TABLE half (x integer)')\n"
    half += "    db.execute_sql('DELETE FROM subscriptions')\n    raise RuntimeError('half way')\n"
    manager.register("http://example.com/", ["a"], SECRET)
    with pytest.raises(Invalid, match="half way"):
        schema.up(db, directory=scripts(tmp_path, m0009_half=half))
    with db.connection_context():
        assert not db.table_exists("half")
        assert Subscription.select().count() == 1
    assert schema.diff(db) == ""
    assert schema.pending(db) == []


def test_a_rebuild_of_the_table_keeps_what_hangs_on_it(adopted: Place, tmp_path: Path) -> None:
    directory = scripts(tmp_path, m0009_weight=REBUILD)
    db = open_database(adopted.url)
    assert schema.up(db, directory=directory) == [*NAMES, "0009_weight"]
    assert rows(adopted, "SELECT count(*), sum(weight) FROM webhooks") == [(26, 182)]
    filled = rows(adopted, "SELECT count(*) FROM subscriptions")
    assert filled > [(26,)]
    assert schema.down(db, directory=directory) == ["0009_weight"]
    assert rows(adopted, "SELECT count(*) FROM subscriptions") == filled
    assert schema.diff(db) == ""
    db.close_all()  # type: ignore[attr-defined]


@only_sqlite
def test_rows_that_point_nowhere_are_reported(db: Database, tmp_path: Path) -> None:
    orphan = "def up(migrator, db):\n    db.execute_sql(\"INSERT INTO subscriptions VALUES ('a', '', 'gone')\")\n"
    with pytest.raises(Invalid, match="subscriptions"):
        schema.up(db, directory=scripts(tmp_path, m0009_orphan=orphan))
    with db.connection_context():
        assert Subscription.select().count() == 0
        assert db.pragma("foreign_keys") == 1  # type: ignore[attr-defined]


def test_two_migrations_at_once_both_succeed(backend: str, empty: Place) -> None:
    if backend == "sqlite":
        shutil.copy(DATA / "webhooks.db", empty.file)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: manage(empty, "migrate", "up"), range(4)))
    assert [one.returncode for one in done] == [0] * 4
    assert sorted(one.stdout for one in done) == [APPLIED, *["nothing to apply\n"] * 3]


def test_who_waits_for_another_migration_is_told_so(empty: Place) -> None:
    db = open_database(empty.url, create=True)
    command = [sys.executable, str(ROOT / "manage.py"), "migrate", "up"]
    env = environment(DATABASE_URL=empty.url)
    with db.connection_context(), exclusive(db, schema.ADVISORY_LOCK):
        second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert second.stderr and second.stderr.readline() == "waiting for another process that works on this database\n"
    assert second.communicate(timeout=60)[0] == APPLIED
    db.close_all()  # type: ignore[attr-defined]


@only_postgres
def test_a_migration_beside_a_long_transaction_says_what_to_do(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pool.SESSION, "lock_timeout", "100ms")
    directory = scripts(tmp_path, m0009_weight=REBUILD)
    db, other = open_database(place.url), open_database(place.url)
    with other.connection_context(), other.atomic():
        other.execute_sql("SELECT count(*) FROM webhooks")
        with pytest.raises(Invalid, match=r"rolled back: .*: something else uses these tables, try again"):
            schema.up(db, directory=directory)
    assert schema.up(db, directory=directory) == ["0009_weight"]
    for one in (db, other):
        one.close_all()  # type: ignore[attr-defined]


def test_the_application_refuses_to_start_while_migrations_are_pending(empty: Place) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "app.py")],
        env=environment(DATABASE_URL=empty.url),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "python manage.py migrate up" in done.stderr
    assert "Traceback" not in done.stderr


FAILS = """
def up(migrator, db):
    db.execute_sql("CREATE TABLE extra (x integer)")
    db.execute_sql("DELETE FROM subscriptions")
    raise RuntimeError("the second one fails")

def down(migrator, db):
    pass
"""


KEEPS = """
def up(migrator, db):
    pass

def down(migrator, db):
    raise RuntimeError("this one cannot be reverted")
"""


def everything_in(db: Database) -> dict[str, list[Any]]:
    """Every table with its rows, the runner's history included."""
    with db.connection_context():
        tables = sorted(db.get_tables())
        return {table: sorted(db.execute_sql(f"SELECT * FROM {table}").fetchall(), key=repr) for table in tables}


def filled(db: Database, manager: WebhookManager) -> str:
    """Something in every table that hangs on a webhook; its id."""
    webhook_id = manager.register("http://example.com/", ["a", "b"], SECRET, team="ne")
    manager.update(webhook_id, {"enabled": False, "description": "d"})
    now = clock.now()
    with db.connection_context():
        Event.insert(event_id="evt_1", event_type="a", payload="{}", created_at=now).execute(db)
        Delivery.insert(
            webhook=webhook_id, event="evt_1", status="cancelled", reason="cancelled by request", created_at=now
        ).execute(db)
        Attempt.insert(delivery=1, number=1, started_at=now, duration_ms=1).execute(db)
        Lane.insert(webhook=webhook_id, due_at=now).execute(db)
        Import.insert(webhook_id=webhook_id, entry="{}", imported_at=now).execute(db)
        replay = {
            "replay_id": "rpl_1",
            "webhook": webhook_id,
            "since": now,
            "until": now,
            "statuses": "all",
            "cursor": "[]",
        }
        Replay.insert(replay | {"statuses": "all", "created_at": now}).execute(db)
        Heartbeat.insert(worker_id="w", host="h", started_at=now, beat_at=now).execute(db)
        Webhook.update(earlier_secrets="[]", total_calls=2**40, failed_calls=2**33).execute(db)
    return webhook_id


def test_several_migrations_of_which_the_second_fails_change_nothing(
    db: Database, manager: WebhookManager, tmp_path: Path
) -> None:
    filled(db, manager)
    before = everything_in(db)
    directory = scripts(tmp_path, m0008_weight=REBUILD, m0009_fails=FAILS)
    with pytest.raises(Invalid, match="everything was rolled back: the second one fails"):
        schema.up(db, directory=directory)
    assert everything_in(db) == before
    assert schema.diff(db) == ""
    assert schema.up(db, "0008_weight", directory) == ["0008_weight"]


def test_a_way_down_that_fails_in_the_middle_changes_nothing(
    db: Database, manager: WebhookManager, tmp_path: Path
) -> None:
    directory = scripts(tmp_path, m0007_keeps=KEEPS, m0008_weight=REBUILD)
    filled(db, manager)
    schema.up(db, directory=directory)
    before = everything_in(db)
    with pytest.raises(Invalid, match="everything was rolled back: this one cannot be reverted"):
        schema.down(db, "0001_webhooks", directory)
    assert everything_in(db) == before
    assert [name for name, applied in schema.status(db, directory) if applied is None] == []


def test_a_first_run_that_fails_leaves_an_empty_database(empty: Place, tmp_path: Path) -> None:
    db = open_database(empty.url)
    with pytest.raises(Invalid, match="the second one fails"):
        schema.up(db, directory=scripts(tmp_path, m0009_fails=FAILS))
    assert everything_in(db) == {}
    db.close_all()  # type: ignore[attr-defined]


def test_all_the_way_down_and_up_keeps_webhooks_and_their_counters(db: Database, manager: WebhookManager) -> None:
    webhook_id = filled(db, manager)
    before = manager.get_all()
    assert schema.down(db, "0001_webhooks") == list(reversed(NAMES))
    with db.connection_context():
        assert set(db.get_tables()) - {"sqlite_sequence"} == {"schema_migration", "webhooks"}
        assert db.execute_sql("SELECT webhook_id, total_calls FROM webhooks").fetchall() == [(webhook_id, 2**40)]
    assert schema.up(db) == NAMES
    assert schema.diff(db) == ""
    assert manager.get_all() == before
    assert [found["webhook_id"] for found in manager.list(event="b")] == [webhook_id]


def test_one_migration_down_and_up_keeps_what_the_release_before_knows(db: Database, manager: WebhookManager) -> None:
    filled(db, manager)
    before = everything_in(db)
    assert schema.down(db, "0003_imports_replays_workers")[-1] == "0003_imports_replays_workers"
    with db.connection_context():
        assert db.execute_sql("SELECT last_error FROM deliveries").fetchone() == ("cancelled by request",)
    schema.up(db)
    after = everything_in(db)
    same = set(before) - {"schema_migration", "imports", "replays", "workers", "webhooks", "deliveries"}
    assert {table: after[table] for table in same} == {table: before[table] for table in same}
    assert after["imports"] == after["replays"] == after["workers"] == []
    assert len(after["webhooks"]) == len(after["deliveries"]) == 1
    assert schema.diff(db) == ""


def test_the_release_before_goes_on_writing_beside_the_newest_schema(db: Database, manager: WebhookManager) -> None:
    now = stored_time(clock.now())
    for statement in (
        f"""INSERT INTO webhooks (webhook_id, url, events, secret, team, created_at, updated_at, description, headers,
            enabled, total_calls, failed_calls)
            VALUES ('w', 'http://example.com/', '["a"]', 's', NULL, '{now}', '{now}', NULL, NULL, TRUE, 0, 0)""",
        "INSERT INTO subscriptions (event_type, team, webhook_id) VALUES ('a', '', 'w')",
        f"INSERT INTO events (event_id, event_type, payload, created_at) VALUES ('e', 'a', '{{}}', '{now}')",
        f"""INSERT INTO deliveries (webhook_id, event_id, status, leased, attempts, attempts_before, next_attempt_at,
            created_at) VALUES ('w', 'e', 'pending', TRUE, 0, 0, '{now}', '{now}')""",
        f"INSERT INTO lanes (webhook_id, due_at, failures) VALUES ('w', '{now}', 0)",
        f"""UPDATE deliveries SET status = 'succeeded', leased = FALSE, attempts = 1, next_attempt_at = NULL,
            finished_at = '{now}', last_status_code = 200""",
        "UPDATE webhooks SET previous_secret = secret, secret = 'new'",
    ):
        with db.connection_context():
            db.execute_sql(statement)
    assert manager.get("w")["enabled"]
    assert manager.unregister("w")
    with db.connection_context():
        assert Delivery.select().count() == 0


def test_rows_that_pointed_nowhere_before_do_not_stop_a_migration(tmp_path: Path) -> None:
    with databases.migrated("sqlite", tmp_path) as place:
        lax = sqlite3.connect(place.file)
        with lax:
            lax.execute("INSERT INTO subscriptions VALUES ('a', '', 'gone')")
        lax.close()
        db = open_database(place.url)
        assert schema.up(db, directory=scripts(tmp_path, m0009_weight=REBUILD)) == ["0009_weight"]
        db.close_all()  # type: ignore[attr-defined]


def test_nothing_to_apply_waits_for_nobody(place: Place) -> None:
    writer, other = open_database(place.url), open_database(place.url, pragmas={"busy_timeout": 0})
    with writer.connection_context(), writer.atomic():
        writer.execute_sql("DELETE FROM subscriptions")
        assert schema.up(other) == []
    for one in (writer, other):
        one.close_all()  # type: ignore[attr-defined]


PRIMARY = "PRIMARY KEY|subscriptions_pkey"


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("SELECT * FROM webhooks WHERE team = 'ne' ORDER BY created_at, webhook_id LIMIT 50", "idx_webhooks_team"),
        (
            "SELECT * FROM webhooks WHERE (created_at, webhook_id) > ('2026-01-01T00:00:00Z', 'x') "
            "ORDER BY created_at, webhook_id LIMIT 50",
            "idx_webhooks_created",
        ),
        ("SELECT * FROM webhooks WHERE webhook_id = 'x'", "webhooks_1|webhooks_pkey"),
        ("SELECT webhook_id FROM subscriptions WHERE event_type IN ('a', '*') AND team IN ('', 'ne')", PRIMARY),
        ("DELETE FROM subscriptions WHERE webhook_id = 'x'", "idx_subscriptions_webhook"),
    ],
)
def test_the_hot_queries_seek_and_never_sort(db: Database, query: str, index: str) -> None:
    with db.connection_context():
        steps = plan(db, query)
    assert any(re.search(index, step) for step in steps), steps
    assert not any("TEMP B-TREE" in step or "Sort" in step for step in steps), steps
    assert not any("SCAN" in step or "Seq Scan" in step for step in steps if not re.search(index, step)), steps
