"""Migrations by hand: up, down and up again, adopting the replaced service's file, and failing without a trace."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, database, schema
from hookline.database import alone, open_database
from hookline.errors import Invalid
from models import Subscription
from tests.conftest import DATA, ROOT, SECRET, environment, manage, only_postgres, only_sqlite
from tests.databases import Place

LEGACY = (
    "webhook_id, url, events, secret, team, created_at, total_calls, failed_calls, last_success, last_failure, enabled"
)
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


@pytest.fixture
def adopted(tmp_path: Path) -> Place:
    """A copy of the replaced service's SQLite file."""
    file = shutil.copy(DATA / "webhooks.db", tmp_path / "webhooks.db")
    return Place(f"sqlite:///{file}", tmp_path)


def rows(place: Place, sql: str) -> list[Any]:
    db = sqlite3.connect(place.file)
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def dump(place: Place) -> list[str]:
    db = sqlite3.connect(place.file)
    try:
        return list(db.iterdump())
    finally:
        db.close()


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
        ("UPDATE webhooks SET last_success = 'yesterday' WHERE team = 'sf'", "last_success"),
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
    with db.connection_context(), alone(db, schema.ADVISORY_LOCK):
        second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert second.stderr and second.stderr.readline() == "waiting for another process that works on this database\n"
    assert second.communicate(timeout=60)[0] == APPLIED
    db.close_all()  # type: ignore[attr-defined]


@only_postgres
def test_a_migration_beside_a_long_transaction_says_what_to_do(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(database.SESSION, "lock_timeout", "100ms")
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
