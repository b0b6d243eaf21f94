"""Storage on real databases: group commit, full disks, clients and servers that go away, and the plans of queries."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peewee import Database

import models
from hookline import WebhookManager, events, legacy, webhooks
from hookline.errors import Invalid, NotFound, Unavailable
from hookline.events import NewEvent
from hookline.registration import Registration
from hookline.store import schema
from hookline.store.open import open_database, require_reachable, storage_of
from hookline.store.pool import is_postgres
from hookline.store.storage import Storage
from hookline.store.units import connected
from tests.conftest import SECRET, only_postgres, only_sqlite
from tests.databases import Place, Postgres, execute, named, plan, wait_for_a_waiter
from tests.store.handles import in_use

PRIMARY = "PRIMARY KEY|subscriptions_pkey"


@pytest.fixture
async def storage(db: Database) -> AsyncIterator[Storage]:
    started = storage_of(db)
    await started.start()
    yield started
    await started.stop()


def count(db: Database) -> int:
    return int(db.execute_sql("SELECT count(*) FROM webhooks").fetchone()[0])


async def in_one_group(storage: Storage, *writes: Any) -> list[Any]:
    """Hold the writer back until all are waiting: they then share one commit."""
    held, release = threading.Event(), threading.Event()

    def hold(db: Database) -> None:
        held.set()
        assert release.wait(20)

    first = asyncio.ensure_future(storage.write(hold))
    await asyncio.to_thread(held.wait, 20)
    group = [asyncio.ensure_future(storage.write(*write)) for write in writes]
    await asyncio.sleep(0)  # each runs up to its place in the queue
    release.set()
    await first
    return await asyncio.gather(*group, return_exceptions=True)


@only_sqlite
async def test_a_failing_write_rolls_back_alone_while_its_neighbours_commit(db: Database, storage: Storage) -> None:
    manager = WebhookManager(db=db)
    statements: list[str] = []

    def registers_and_fails(db: Database) -> None:
        manager.register("http://example.com/lost", ["a"], SECRET)
        raise ValueError("after the insert")

    def trace(db: Database) -> None:
        db.connection().set_trace_callback(statements.append)

    writes = [(webhooks.register, Registration(f"http://example.com/{n}", ["a"], SECRET)) for n in range(20)]
    answers = await in_one_group(storage, (trace,), *writes[:10], (registers_and_fails,), *writes[10:])
    await storage.write(lambda db: db.connection().set_trace_callback(None))

    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert [str(exc) for exc in failed] == ["after the insert"]
    assert statements.count("COMMIT") == 1
    assert await storage.read(count) == 20
    urls = {webhook["url"] for webhook in await storage.scan(legacy.everything)}
    assert urls == {f"http://example.com/{n}" for n in range(20)}


async def test_a_full_disk_fails_the_whole_group_and_stores_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/small.db"
    roomy = open_database(url, create=True)
    models.db.initialize(roomy)
    schema.up(roomy)
    with roomy.connection_context():
        pages = roomy.execute_sql("PRAGMA page_count").fetchone()[0]
    roomy.close_all()  # type: ignore[attr-defined]

    db = open_database(url, pragmas={"max_page_count": pages + 2})
    storage = storage_of(db)
    await storage.start()
    writes = [(webhooks.register, Registration("http://example.com/" + "x" * 900, ["a"], SECRET)) for _ in range(100)]
    answers = await in_one_group(storage, *writes)
    assert all(isinstance(answer, Unavailable) for answer in answers)
    assert "disk is full" in str(answers[0])
    assert await storage.read(count) == 0

    webhook_id = await storage.write(webhooks.register, Registration("http://example.com/small", ["a"], SECRET))
    assert (await storage.read(webhooks.get, webhook_id))["url"] == "http://example.com/small"
    await storage.stop()


async def test_a_client_that_goes_away_does_not_stop_the_writer(db: Database, storage: Storage) -> None:
    write = asyncio.ensure_future(
        storage.write(webhooks.register, Registration("http://example.com/gone", ["a"], SECRET))
    )
    await asyncio.sleep(0)
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    assert await storage.write(webhooks.register, Registration("http://example.com/next", ["a"], SECRET))


async def test_stopping_finishes_what_was_accepted(db: Database) -> None:
    storage = storage_of(db)
    await storage.start()
    writes = [
        asyncio.ensure_future(storage.write(webhooks.register, Registration("http://example.com/", ["a"], SECRET)))
        for _ in range(50)
    ]
    await asyncio.sleep(0)
    await storage.stop()
    assert len(set(await asyncio.gather(*writes))) == 50
    with pytest.raises(Unavailable):
        await storage.write(webhooks.register, Registration("http://example.com/", ["a"], SECRET))
    with db.connection_context():
        assert count(db) == 50
    if is_postgres(db):
        with pytest.raises(Unavailable):
            await storage.read(count)


@only_sqlite
async def test_between_calls_nobody_holds_a_connection(db: Database, storage: Storage) -> None:
    for call in (storage.read, storage.scan, storage.write):
        await call(count)
        assert db.is_closed()
        assert in_use(db) == 0
    other = open_database(f"sqlite:///{db.database}")  # an idle reader must not keep the log from being reset
    with other.connection_context():
        assert other.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


async def test_writes_of_one_kind_are_one_call_for_a_group(db: Database, storage: Storage) -> None:
    calls: list[int] = []

    def register_all(db: Database, registrations: list[Registration]) -> list[str]:
        calls.append(len(registrations))
        return webhooks.register_all(db, registrations)

    good = [Registration(f"http://example.com/{n}", ["a"], SECRET) for n in range(10)]
    ids = await asyncio.gather(*(storage.write_together(register_all, one) for one in good))
    assert calls == [10]
    assert [(await storage.read(webhooks.get, one))["url"] for one in ids] == [one.url for one in good]

    bad = Registration("ftp://example.com", ["a"], SECRET)
    writes = [storage.write_together(register_all, one) for one in (good[0], bad, good[1])]
    first, failed, last = await asyncio.gather(*writes, return_exceptions=True)
    assert isinstance(first, str) and isinstance(last, str) and isinstance(failed, Invalid)
    assert await storage.read(count) == 12


@only_sqlite
async def test_every_pooled_connection_is_durable_and_checked(db: Database, storage: Storage) -> None:
    def pragmas(db: Database) -> dict[str, Any]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return {name: db.execute_sql(f"PRAGMA {name}").fetchone()[0] for name in names}

    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    for found in (await storage.read(pragmas), await storage.scan(pragmas), await storage.write(pragmas)):
        assert found == expected


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


def test_pooled_connections_to_postgres_are_set_up_whatever_the_servers_defaults() -> None:
    defaults = {
        "synchronous_commit": "off",
        "timezone": "Asia/Tokyo",
        "datestyle": "German",
        "default_transaction_isolation": "serializable",
        "client_encoding": "latin1",
    }
    server = Postgres(("fsync=off", *(f"{name}={value}" for name, value in defaults.items()))).start()
    try:
        db = open_database(server.url)
        with db.connection_context():
            names = [*defaults, "statement_timeout", "lock_timeout", "application_name"]
            found = {name: db.execute_sql(f"SHOW {name}").fetchone()[0] for name in names}
        db.close_all()  # type: ignore[attr-defined]
        assert found == {
            "synchronous_commit": "on",
            "timezone": "UTC",
            "datestyle": "ISO, DMY",
            "default_transaction_isolation": "read committed",
            "client_encoding": "UTF8",
            "statement_timeout": "30s",
            "lock_timeout": "10s",
            "application_name": "hookline",
        }
        execute(server.url, "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        ascii_only = open_database(named(server.url, "ascii"))
        with pytest.raises(Invalid, match="encoding is SQL_ASCII"):
            require_reachable(ascii_only)
        ascii_only.close_all()  # type: ignore[attr-defined]
    finally:
        server.stop()


def test_a_server_that_makes_no_new_connections_holds_up_nobody_who_has_one() -> None:
    server = Postgres(("fsync=off",)).start()
    db = open_database(server.url)
    connecting = threading.Thread(target=lambda: db.connect() and db.close())
    try:
        db.connect()
        db.close()
        db.connect()  # the pooled one
        server.process.send_signal(signal.SIGSTOP)  # sessions go on, new ones are not begun
        connecting.start()
        for _ in range(3):
            assert db.execute_sql("SELECT 1").fetchone() == (1,)
            db.close()
            db.connect()
        assert connecting.is_alive()
        db.close()
    finally:
        server.process.send_signal(signal.SIGCONT)
        connecting.join(20)
        db.close_all()  # type: ignore[attr-defined]
        server.stop()
    assert not connecting.is_alive()


@only_postgres
def test_what_a_url_leaves_out_comes_from_libpqs_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    name = place.url.rpartition("/")[2].partition("?")[0]
    monkeypatch.setenv("PGDATABASE", name)
    db = open_database(named(place.url, "").replace("/?", "?"))
    with db.connection_context():
        assert db.execute_sql("SELECT current_database()").fetchone() == (name,)
    db.close_all()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hu@sh@127.0.0.1/name",
        "postgresql://user:hu/sh@127.0.0.1/name",
        "postgresql://user:hu%sh@127.0.0.1/name",
    ],
)
def test_a_password_that_is_not_percent_encoded_is_refused_and_not_printed(url: str) -> None:
    with pytest.raises(Invalid, match=r"percent-encoded|not a PostgreSQL URL") as refused:
        require_reachable(open_database(url))
    assert "sh" not in str(refused.value).replace("such", "")


def end_connections(place: Place) -> None:
    """What a restart, a fail-over or an administrator does to them."""
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    execute(place.url, f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}")


@only_postgres
async def test_connections_that_the_server_ended_are_replaced(place: Place, db: Database, storage: Storage) -> None:
    for number in range(3):
        await asyncio.gather(*(storage.read(count) for _ in range(8)))
        await asyncio.to_thread(end_connections, place)
        assert await storage.write(webhooks.register, Registration("http://example.com/", ["a"], SECRET))
        await asyncio.to_thread(end_connections, place)
        assert await storage.read(count) == number + 1


@only_postgres
async def test_a_write_whose_connection_is_lost_half_way_is_made_again(
    place: Place, db: Database, storage: Storage
) -> None:
    manager, tries = WebhookManager(db=db), list[str]()

    def register(db: Database) -> None:
        tries.append(manager.register("http://example.com/", ["a"], SECRET))
        if len(tries) == 1:
            end_connections(place)
            count(db)

    await storage.write(register)
    assert len(tries) == 2
    assert await storage.read(count) == 1


@only_postgres
async def test_a_commit_that_is_lost_is_not_made_again(place: Place, db: Database, storage: Storage) -> None:
    manager, tries = WebhookManager(db=db), list[str]()

    def register(db: Database) -> None:
        tries.append(manager.register("http://example.com/", ["a"], SECRET))
        end_connections(place)

    with pytest.raises(Unavailable, match="may have been stored, or not"):
        await storage.write(register)
    assert len(tries) == 1
    assert await storage.read(count) == 0


@only_postgres
async def test_two_writes_that_wait_for_each_other_both_succeed(db: Database, storage: Storage) -> None:
    manager = WebhookManager(db=db)
    ids = [manager.register("http://example.com/", ["a"], SECRET) for _ in range(2)]
    both = threading.Barrier(2)
    tries = list[str]()

    def rename(db: Database, first: str, second: str) -> None:
        manager.update(first, {"description": "x"})
        tries.append(first)
        if len(tries) <= 2:
            both.wait(20)
        manager.update(second, {"description": "y"})

    await asyncio.gather(storage.write(rename, *ids), storage.write(rename, *reversed(ids)))
    assert len(tries) >= 3


@only_postgres
async def test_an_event_published_while_its_webhook_is_being_deleted_is_stored_without_it(
    place: Place, db: Database, storage: Storage
) -> None:
    manager = WebhookManager(db=db)
    webhook_id = manager.register("http://example.com/", ["a"], SECRET)
    other = open_database(place.url)
    with other.connection_context(), other.atomic():
        other.execute_sql("DELETE FROM webhooks WHERE webhook_id = %s", (webhook_id,))
        publishing = asyncio.ensure_future(storage.write(events.publish_one, NewEvent("a", {})))
        await asyncio.to_thread(wait_for_a_waiter, place.url)
        assert not publishing.done()
    assert (await publishing).deliveries == 0
    other.close_all()  # type: ignore[attr-defined]


@only_postgres
async def test_a_process_has_no_more_connections_than_its_pool(place: Place) -> None:
    db = open_database(place.url, pool_size=3)
    storage = storage_of(db, 3)
    await storage.start()
    connections = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    most = max(
        await asyncio.gather(
            *(storage.read(lambda db: db.execute_sql(f"{connections}").fetchone()[0]) for _ in range(50)),
            *(storage.write(lambda db: db.execute_sql(f"{connections}").fetchone()[0]) for _ in range(50)),
        )
    )
    await storage.stop()
    assert 1 < most <= 3
    assert execute(place.url, connections) == [(1,)]


@only_postgres
async def test_a_notice_of_another_process_is_heard_also_after_the_connection_was_lost(
    place: Place, db: Database, storage: Storage
) -> None:
    other = open_database(place.url)
    telling = storage_of(other)
    await telling.start()
    heard = asyncio.Event()
    storage.listen(heard.set)
    for _ in range(2):
        await asyncio.wait_for(heard.wait(), 20)  # once it listens, or listens again, it wakes of itself
        heard.clear()
        for _ in range(3):  # many at once are one or two
            telling.notify()
        await asyncio.wait_for(heard.wait(), 20)
        await asyncio.sleep(0.1)
        heard.clear()
        await asyncio.to_thread(end_connections, place)
    await telling.stop()


@only_postgres
def test_a_caller_is_told_when_the_commit_was_lost(place: Place, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = db.commit

    def commit_and_lose_the_answer() -> None:
        committed()
        end_connections(place)
        db.execute_sql("SELECT 1")

    monkeypatch.setattr(db, "commit", commit_and_lose_the_answer)
    with pytest.raises(Unavailable, match="it may have been stored, or not"):
        WebhookManager(db=db).register("http://example.com/", ["a"], SECRET)
    with db.connection_context():
        assert count(db) == 1


@only_postgres
def test_a_pool_that_is_closed_while_a_connection_is_made_leaves_none_open(
    place: Place, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, connecting, closed = db._adapter.connect, threading.Event(), threading.Event()  # type: ignore[attr-defined]

    def slowly(*arguments: Any, **options: Any) -> Any:
        connecting.set()
        assert closed.wait(20)
        return connect(*arguments, **options)

    def read() -> None:
        with connected(db):
            db.execute_sql("SELECT 1")

    monkeypatch.setattr(db._adapter, "connect", slowly)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read)
        assert connecting.wait(20)
        db.close_all()  # type: ignore[attr-defined]
        closed.set()
        with pytest.raises(Unavailable):
            reading.result(20)
    ours = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'hookline'"
    for _ in range(1000):
        if execute(place.url, ours) == [(0,)]:
            return
        time.sleep(0.01)
    raise AssertionError("a connection was left open")


def test_values_that_no_database_can_store_are_refused_without_being_shown(db: Database) -> None:
    manager = WebhookManager(db=db)
    for text in ("a\0b", "a\ud800b"):
        with pytest.raises(Invalid, match="description must not contain"):
            manager.register("http://example.com/", ["a"], SECRET, description=text)
    assert manager.send_event("goal", {"team": "a\0b"}).deliveries == 0
    with pytest.raises(Invalid, match="data must not contain lone surrogates"):
        manager.send_event("goal", {"team": "a\ud800b"})
    with (
        pytest.raises(Invalid, match="cannot store one of these values") if is_postgres(db) else pytest.raises(NotFound)
    ):
        manager.get("a\0b")
    webhook_id = manager.register("http://example.com/", ["a"], SECRET)
    for rate in (0, -1.0, 1e-50, 1e9):
        with pytest.raises(Invalid, match=r"rate_limit must be from 0\.0001 to 10000"):
            manager.update(webhook_id, {"rate_limit": rate})
