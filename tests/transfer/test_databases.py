"""Copying between databases: every row on both sides, however it was interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from hookline import WebhookManager, deliveries, events
from hookline.errors import Conflict, Unavailable
from hookline.store import schema
from hookline.store.open import open_database
from hookline.transfer import databases
from models import Delivery
from tests import databases as places
from tests.conftest import ROOT, SECRET, environment, manage, running
from tests.databases import Place, execute
from tests.transfer.copying import PAIRS, contents, fill, opened, source_and_target

MANY = 2000  # deliveries where a copy is interrupted
INTERRUPTED = """
import sys
from hookline.transfer import databases
from hookline.store.open import open_database
def progress(what, done, total):
    if what == "copied deliveries":
        print(done, flush=True)
        sys.stdin.readline()
databases.copy(open_database(sys.argv[1]), open_database(sys.argv[2]), batch=100, progress=progress)
"""


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("empty", [True, False])
def test_every_row_is_on_the_other_side_as_it_was(tmp_path: Path, first: str, second: str, empty: bool) -> None:
    with source_and_target(first, second, tmp_path, empty) as places, opened(*places) as (source, target):
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
def test_delivery_ids_go_on_above_the_highest_of_the_source(tmp_path: Path, first: str, second: str) -> None:
    with source_and_target(first, second, tmp_path) as places, opened(*places) as (source, target):
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


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_a_target_that_is_not_empty_is_refused_without_overwrite(tmp_path: Path, backend: str) -> None:
    with source_and_target("sqlite", backend, tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        WebhookManager(db=target).register("http://example.com/there", ["a"], SECRET)
        before = contents(target)
        with pytest.raises(Conflict, match=r"not empty: 1 webhooks, 1 subscriptions.*--overwrite"):
            databases.copy(source, target)
        assert contents(target) == before
        databases.copy(source, target, overwrite=True)
        assert contents(target) == contents(source)


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
    with source_and_target(first, second, tmp_path) as places, ExitStack() as stack:
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
    with source_and_target(first, second, tmp_path) as places, opened(*places) as (source, target):
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
    with source_and_target("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        before = contents(source)

        def write(what: str, done: int, total: int) -> None:
            other = open_database(places[0].url)
            WebhookManager(db=other).register("http://example.com/late", ["goal"], SECRET)
            other.close_all()  # type: ignore[attr-defined]

        databases.copy(source, target, progress=write)
        assert contents(target) == before != contents(source)


def test_a_target_that_somebody_uses_is_refused(tmp_path: Path) -> None:
    with source_and_target("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
        fill(source)
        with running(places[1], RUN_WORKER="false"), pytest.raises(Conflict, match="connected to the target: stop it"):
            databases.copy(source, target)
        assert not any(contents(target).values())


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_a_service_is_noticed_whatever_its_application_name_is(tmp_path: Path, backend: str) -> None:
    with source_and_target("sqlite", backend, tmp_path) as places, opened(*places) as (source, target):
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
    with source_and_target(first, second, tmp_path) as places, opened(*places) as (source, target):
        manager = WebhookManager(db=source)
        webhook_id = manager.register("http://example.com/", ["goal"], SECRET)
        manager.update(webhook_id, {"rate_limit": 1 / 60})
        manager.send_event("other", {})
        databases.copy(source, target)
        assert contents(target) == contents(source)
        assert WebhookManager(db=target).send_event("goal", {}).deliveries == 1


@pytest.mark.parametrize("backend", places.BACKENDS)
def test_two_copies_at_once_are_refused_and_the_first_is_whole(tmp_path: Path, backend: str) -> None:
    with source_and_target("sqlite", backend, tmp_path) as places, opened(*places) as (source, target):
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
    with source_and_target("sqlite", backend, tmp_path, empty=True) as places, opened(*places) as (source, target):
        with target.connection_context():
            target.execute_sql("CREATE TABLE events (mine integer)")
        with pytest.raises(Conflict, match=r"tables of another program: events. Use an empty database"):
            databases.copy(source, target, overwrite=True)
        with target.connection_context():
            assert target.get_tables() == ["events"]


def test_a_copy_whose_server_goes_away_says_that_it_goes_on(tmp_path: Path) -> None:
    with source_and_target("sqlite", "postgres", tmp_path) as places, opened(*places) as (source, target):
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
