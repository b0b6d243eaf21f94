"""Copying between databases: every row on both sides, however it was interrupted, and no secret on the screen."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from peewee import Database

import models
from hookline import WebhookManager, deliveries, events
from hookline.errors import Conflict, Invalid, Unavailable
from hookline.store import schema
from hookline.store.open import open_database
from hookline.transfer import databases, rows
from models import Attempt, Delivery, Webhook
from tests import databases as places
from tests.conftest import DATA, ROOT, SECRET, environment, manage, running
from tests.databases import Place, execute

PAIRS = [("sqlite", "postgres"), ("postgres", "sqlite"), ("sqlite", "sqlite"), ("postgres", "postgres")]
AWKWARD = ["", "\\N", "\t\n\r\\", "'\";--", "ä€😀\u2028", "\x01\x7f", "{}[],", " " * 5]
MANY = 2000  # deliveries where a copy is interrupted


@contextmanager
def two(first: str, second: str, folder: Path, empty: bool = False) -> Iterator[tuple[Place, Place]]:
    """A migrated source, and a target that is migrated or empty."""
    for one in (first, second):
        if reason := places.why_not(one):
            pytest.skip(reason)
    (folder / "from").mkdir()
    (folder / "to").mkdir()
    make = places.empty if empty else places.migrated
    with places.migrated(first, folder / "from") as source, make(second, folder / "to") as target:
        yield source, target


@contextmanager
def opened(*places: Place) -> Iterator[list[Database]]:
    found = [open_database(place.url) for place in places]
    models.db.initialize(found[0])
    yield found
    for db in found:
        db.close_all()  # type: ignore[attr-defined]


def fill(db: Database) -> None:
    """Rows of every table, with every kind of value."""
    manager = WebhookManager(db=db)
    ids = [
        manager.register(f"http://example.com/{n}", ["goal"], SECRET + text, text or None, description=text)
        for n, text in enumerate(AWKWARD)
    ]
    ids.append(manager.register("http://example.com/", ["goal", "*"], SECRET, headers={"X-Own": "mine"}))
    manager.update(ids[-1], {"rate_limit": 0.1, "ordered": True, "retry_schedule": [1.5, 2]})
    manager.update(ids[0], {"enabled": False})
    for text in AWKWARD:
        events.publish_one(db, events.NewEvent("goal", {"text": text, "team": text}, f"key {len(text)} {text!a}"))
    with db.connection_context(), db.atomic():
        changed = {"total_calls": 2**63 - 1, "last_success": models.read_time("9999-12-31T23:59:59.999999Z")}
        Webhook.update(changed).where(Webhook.webhook_id == ids[1]).execute(db)
        numbers = [row[0] for row in Delivery.select(Delivery.delivery_id).tuples().execute(db)]
        Delivery.update(leased=True, attempts=3, last_error="x", last_response="\ufffd").where(
            Delivery.delivery_id == numbers[0]
        ).execute(db)
        at = models.read_time("1970-01-01T00:00:00.000001Z")
        for number in range(1, 3):
            Attempt.insert(delivery=numbers[0], number=number, started_at=at, duration_ms=0, response="").execute(db)
        models.Import.insert(webhook_id=ids[0], entry='{"url": "ä"}', imported_at=at).execute(db)
        models.Replay.insert(
            replay_id="rpl_1", webhook=ids[0], since=at, until=at, statuses="all", cursor="[]", created_at=at
        ).execute(db)


def contents(db: Database) -> dict[str, list[rows.CopiedRow]]:
    with db.connection_context():
        return {
            table.name: sorted((row for batch in rows.read_batches(db, table, 100) for row in batch), key=repr)
            for table in rows.TABLES
        }


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("empty", [True, False])
def test_every_row_is_on_the_other_side_as_it_was(tmp_path: Path, first: str, second: str, empty: bool) -> None:
    with two(first, second, tmp_path, empty) as places, opened(*places) as (source, target):
        fill(source)
        before = contents(source)
        assert all(before.values())
        compared = databases.copy(source, target, batch=3)
        assert contents(target) == before == contents(source)
        assert [(table.table, table.rows, table.same) for table in compared] == [
            (name, len(values), True) for name, values in before.items()
        ]
        assert schema.diff(target) == ""
        schema.require_current(target)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_ids_go_on_above_all_that_were_ever_given(tmp_path: Path, first: str, second: str) -> None:
    with two(first, second, tmp_path) as places, opened(*places) as (source, target):
        manager = WebhookManager(db=source)
        last = manager.register("http://example.com/last", ["goal"], SECRET)
        manager.register("http://example.com/", ["other"], SECRET)
        manager.send_event("other", {})
        manager.send_event("goal", {})
        highest = deliveries.page(source)[0]["delivery_id"]
        manager.unregister(last)
        assert deliveries.page(source)[0]["delivery_id"] < highest
        databases.copy(source, target)
        WebhookManager(db=target).send_event("other", {})
        assert deliveries.page(target)[0]["delivery_id"] == highest + 1


def test_json_to_sqlite_to_postgres_and_back_to_json_is_the_same(tmp_path: Path) -> None:
    with two("sqlite", "postgres", tmp_path, empty=True) as (source, target):
        file, back = tmp_path / "webhooks.json", tmp_path / "back.json"
        file.write_bytes((DATA / "webhooks.json").read_bytes())
        assert manage(source, "import", str(file)).returncode == 0
        done = manage(source, "copy", "--from", source.url, "--to", target.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert "to do: migrate the target, which has none of our tables, and copy" in done.stdout
        assert done.stdout.count("  same\n") == len(rows.TABLES)
        assert manage(target, "export", str(back)).returncode == 0
        assert json.loads(back.read_text()) == json.loads(file.read_text())
        assert "your-secure-secret" not in done.stdout


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_a_target_that_is_not_empty_is_refused_unless_it_may_be_overwritten(tmp_path: Path, backend: str) -> None:
    with two("sqlite", backend, tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        WebhookManager(db=target).register("http://example.com/there", ["a"], SECRET)
        before = contents(target)
        with pytest.raises(Conflict, match=r"not empty: 1 webhooks, 1 subscriptions.*--overwrite"):
            databases.copy(source, target)
        assert contents(target) == before
        databases.copy(source, target, overwrite=True)
        assert contents(target) == contents(source)


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path, backend: str) -> None:
    with two("sqlite", backend, tmp_path, empty=True) as (source, target):
        with opened(source) as (db,):
            fill(db)
        if backend == "sqlite":
            target.file.unlink()
        done = manage(source, "copy", "--from", source.url, "--to", target.url, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "webhooks                   9 rows" in done.stdout
        assert "copy these" in done.stdout
        if backend == "sqlite":
            assert list(target.folder.iterdir()) == []
        else:
            assert execute(target.url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]


INTERRUPTED = """
import sys
from hookline.transfer import databases, rows
from hookline.store.open import open_database
seen = [0]
def progress(what, done, total):
    if what == "copied deliveries":
        print(done, flush=True)
        sys.stdin.readline()
databases.copy(open_database(sys.argv[1]), open_database(sys.argv[2]), batch=100, progress=progress)
"""


def interrupted(source: Place, target: Place) -> None:
    """A copy that is killed in the middle of the deliveries."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, source.url, target.url],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    for number in range(1, 6):
        assert process.stdout.readline() == f"{number * 100}\n"
        process.stdin.write("\n")
        process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(("first", "second"), PAIRS[:2])
def test_a_copy_that_was_killed_goes_on_where_it_was(tmp_path: Path, first: str, second: str) -> None:
    with two(first, second, tmp_path) as places, ExitStack() as stack:
        source, target = stack.enter_context(opened(*places))
        WebhookManager(db=source).register("http://example.com/", ["goal"], SECRET)
        events.publish_all(source, [events.NewEvent("goal", {"n": n}) for n in range(MANY)])
        interrupted(*places)
        with target.connection_context():
            half = Delivery.select().count(target)
        assert 500 <= half < MANY
        with pytest.raises(Conflict, match="not finished"):
            schema.require_current(target)
        started = subprocess.run(
            [sys.executable, str(ROOT / "app.py")],
            env=environment(DATABASE_URL=places[1].url),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (started.returncode, "was not finished" in started.stderr) == (1, True)
        seen: list[int] = []
        compared = databases.copy(
            source,
            target,
            progress=lambda what, done, total: seen.append(done) if what == "copied deliveries" else None,
        )
        assert all(table.same for table in compared)
        assert seen[0] > half
        assert contents(target) == contents(source)


@pytest.mark.parametrize("change", ["DELETE FROM webhooks", "UPDATE events SET payload = 'x'"])
@pytest.mark.parametrize(("first", "second"), PAIRS[:2])
def test_a_source_that_changed_before_the_copy_went_on_is_noticed(
    tmp_path: Path, first: str, second: str, change: str
) -> None:
    with two(first, second, tmp_path) as places, opened(*places) as (source, target):
        WebhookManager(db=source).register("http://example.com/", ["goal"], SECRET)
        events.publish_all(source, [events.NewEvent("goal", {"n": n}) for n in range(MANY)])
        interrupted(*places)
        with source.connection_context():
            source.execute_sql(change)
        with pytest.raises(Conflict, match=r"written to meanwhile.*--overwrite"):
            databases.copy(source, target)
        with pytest.raises(Conflict, match="not finished"):
            schema.require_current(target)
        databases.copy(source, target, overwrite=True)
        assert contents(target) == contents(source)


def test_what_is_written_while_the_copy_runs_is_not_in_it(tmp_path: Path) -> None:
    with two("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        before = contents(source)

        def write(what: str, done: int, total: int) -> None:
            other = open_database(places[0].url)
            WebhookManager(db=other).register("http://example.com/late", ["goal"], SECRET)
            other.close_all()  # type: ignore[attr-defined]

        databases.copy(source, target, progress=write)
        assert contents(target) == before != contents(source)


def test_a_text_that_postgres_cannot_hold_is_named(tmp_path: Path) -> None:
    with two("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        webhook_id = WebhookManager(db=source).register("http://example.com/", ["goal"], SECRET)
        with source.connection_context():
            source.execute_sql("UPDATE webhooks SET description = ?", ("a\0b",))
        with pytest.raises(Invalid, match=f"webhooks {webhook_id}: description has a NUL character"):
            databases.copy(source, target)
        assert contents(target)["webhooks"] == []


def test_a_database_is_never_copied_into_itself(tmp_path: Path) -> None:
    with two("sqlite", "postgres", tmp_path) as (sqlite, postgres), opened(sqlite, postgres) as databases_:
        for db in databases_:
            WebhookManager(db=db).register("http://example.com/", ["a"], SECRET)
        os.link(sqlite.file, tmp_path / "link.db")
        os.symlink(sqlite.file, tmp_path / "symlink.db")
        others = [(sqlite.url, f"sqlite:///{tmp_path}/{name}.db") for name in ("link", "symlink")]
        alias = postgres.url.replace("127.0.0.1", "localhost")
        for source, target in ((sqlite.url, sqlite.url), *others, (postgres.url, postgres.url), (postgres.url, alias)):
            for more in ((), ("--dry-run",)):
                done = manage(sqlite, "copy", "--from", source, "--to", target, "--overwrite", *more)
                assert done.returncode == 1
                assert "same database" in done.stderr
                assert "Traceback" not in done.stderr
        assert [len(WebhookManager(db=db).webhooks) for db in databases_] == [1, 1]


def test_a_target_that_somebody_uses_is_refused(tmp_path: Path) -> None:
    with two("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        with running(places[1], RUN_WORKER="false"), pytest.raises(Conflict, match="connected to the target: stop it"):
            databases.copy(source, target)
        assert not any(contents(target).values())


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_a_service_is_noticed_whatever_it_is_called(tmp_path: Path, backend: str) -> None:
    with two("sqlite", backend, tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        name = "" if backend == "sqlite" else f"{'&' if '?' in places[1].url else '?'}application_name=web"
        with running(Place(places[1].url + name, places[1].folder), RUN_WORKER="false") as server:
            webhook_id = server.register().json()["webhook_id"]
            for more in ((), ("--dry-run",)):
                done = manage(places[0], "copy", "--from", places[0].url, "--to", places[1].url, "--overwrite", *more)
                assert (done.returncode, "connected to the target: stop it" in done.stderr) == (1, True)
        assert list(WebhookManager(db=target).webhooks) == [webhook_id]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_source_without_deliveries_and_with_odd_rates_is_copied(tmp_path: Path, first: str, second: str) -> None:
    with two(first, second, tmp_path) as places, opened(*places) as (source, target):
        manager = WebhookManager(db=source)
        webhook_id = manager.register("http://example.com/", ["goal"], SECRET)
        manager.update(webhook_id, {"rate_limit": 1 / 60})
        manager.send_event("other", {})
        databases.copy(source, target)
        assert contents(target) == contents(source)
        assert WebhookManager(db=target).send_event("goal", {}).deliveries == 1


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_two_copies_at_once_are_refused_and_the_first_is_whole(tmp_path: Path, backend: str) -> None:
    with two("sqlite", backend, tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        second: list[subprocess.CompletedProcess[str]] = []

        def try_another(what: str, done: int, total: int) -> None:
            if not second:
                second.append(manage(places[0], "copy", "--from", places[0].url, "--to", places[1].url))

        databases.copy(source, target, progress=try_another)
        assert second[0].returncode == 1
        assert ("a command of Hookline" if backend == "sqlite" else "another process copies") in second[0].stderr
        assert contents(target) == contents(source)


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_tables_of_another_program_are_named_and_left_alone(tmp_path: Path, backend: str) -> None:
    with two("sqlite", backend, tmp_path, empty=True) as places, opened(*places) as (source, target):
        with target.connection_context():
            target.execute_sql("CREATE TABLE events (mine integer)")
        with pytest.raises(Conflict, match=r"tables of another program: events. Use an empty database"):
            databases.copy(source, target, overwrite=True)
        with target.connection_context():
            assert target.get_tables() == ["events"]


def test_a_source_that_is_not_migrated_is_named(tmp_path: Path) -> None:
    with two("sqlite", "sqlite", tmp_path) as (source, target):
        source.file.write_bytes((DATA / "webhooks.db").read_bytes())
        done = manage(target, "copy", "--from", source.url, "--to", target.url, "--dry-run")
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "--from cannot be read: the database needs migrating" in done.stderr


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
def test_what_another_program_has_spoilt_is_named(tmp_path: Path, damage: str, named: str) -> None:
    with two("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        with source.connection_context():
            source.execute_sql(damage)
        with pytest.raises(Invalid, match=named):
            databases.copy(source, target)


def test_what_belongs_to_nothing_is_named(tmp_path: Path) -> None:
    with two("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        with source.connection_context():
            source.execute_sql("PRAGMA foreign_keys = 0")
            source.execute_sql("DELETE FROM webhooks")
            source.execute_sql("PRAGMA foreign_keys = 1")
        with pytest.raises(Conflict, match=r"subscriptions: .*what it belongs to is missing"):
            databases.copy(source, target)


def test_a_copy_whose_server_goes_away_says_that_it_goes_on(tmp_path: Path) -> None:
    with two("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        WebhookManager(db=source).register("http://example.com/", ["goal"], SECRET)
        events.publish_all(source, [events.NewEvent("goal", {"n": n}) for n in range(MANY)])
        ended: list[str] = []

        def end(what: str, done: int, total: int) -> None:
            if what == "copied deliveries" and not ended:
                ended.append(what)
                others = "datname = current_database() AND pid <> pg_backend_pid()"
                execute(places[1].url, f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}")

        with pytest.raises(Unavailable, match=r"interrupted: .*Run it again, and it goes on"):
            databases.copy(source, target, batch=500, progress=end)
        databases.copy(source, target)
        assert contents(target) == contents(source)


def test_wrong_urls_are_one_line_without_the_password(tmp_path: Path) -> None:
    place = Place(f"sqlite:///{tmp_path}/webhooks.db", tmp_path)
    (tmp_path / "there.db").write_bytes(places.migrated_file())
    there = f"sqlite:///{tmp_path}/there.db"
    wrong: list[tuple[str, str, str]] = [
        ("mysql://user:hush@host/x", there, "database URL must be like"),
        (place.url, there, "no file at --from"),
        (there, "postgresql://user:hush@127.0.0.1:1/x", "cannot be reached"),
        (there, "postgresql://user:hush@[/x", "not a PostgreSQL URL"),
    ]
    for source, target, reason in wrong:
        done: Any = manage(place, "copy", "--from", source, "--to", target)
        assert done.returncode == 1
        assert reason in done.stderr
        assert "hush" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
    assert not place.file.exists()


def test_every_table_is_copied() -> None:
    assert {table.name for table in rows.TABLES} == {
        str(model._meta.table_name) for model in models.TABLES if model is not models.Heartbeat
    }


def test_a_strangers_id_in_a_copys_error_does_not_drive_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with places.migrated("sqlite", tmp_path / "a") as source, places.migrated("sqlite", tmp_path / "b") as target:
        lax = sqlite3.connect(source.file)
        with lax:
            lax.execute(
                "INSERT INTO webhooks (webhook_id, url, events, secret, created_at) "
                "VALUES (char(27) || '[2J', 'http://example.com/', '[]', 's', 'never')"
            )
        lax.close()
        failed = manage(source, "copy", "--from", source.url, "--to", target.url)
        assert r"webhooks \x1b[2J: created_at is not a time" in failed.stderr
        assert "\x1b" not in failed.stderr + failed.stdout
