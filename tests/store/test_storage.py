"""Storage on real databases: group commit, full disks, clients and servers that go away."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from peewee import Database

import models
from hookline import WebhookManager, events, legacy, webhooks
from hookline.errors import Invalid, Unavailable
from hookline.events import NewEvent
from hookline.registration import Registration
from hookline.store import schema
from hookline.store.open import open_database, storage_of
from hookline.store.pool import is_postgres
from hookline.store.storage import Storage
from tests.conftest import SECRET, only_postgres, only_sqlite
from tests.databases import Place, wait_for_a_waiter
from tests.store.connections import count, end_connections, in_use


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


async def test_write_together_calls_fn_once_for_a_group(db: Database, storage: Storage) -> None:
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


@only_postgres
async def test_connections_that_the_server_ended_are_replaced(place: Place, db: Database, storage: Storage) -> None:
    for number in range(3):
        await asyncio.gather(*(storage.read(count) for _ in range(8)))
        await asyncio.to_thread(end_connections, place)
        assert await storage.write(webhooks.register, Registration("http://example.com/", ["a"], SECRET))
        await asyncio.to_thread(end_connections, place)
        assert await storage.read(count) == number + 1


@only_postgres
async def test_a_write_whose_connection_is_lost_is_tried_again(place: Place, db: Database, storage: Storage) -> None:
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
async def test_a_lost_commit_is_not_tried_again(place: Place, db: Database, storage: Storage) -> None:
    manager, tries = WebhookManager(db=db), list[str]()

    def register(db: Database) -> None:
        tries.append(manager.register("http://example.com/", ["a"], SECRET))
        end_connections(place)

    with pytest.raises(Unavailable, match="may have been stored, or not"):
        await storage.write(register)
    assert len(tries) == 1
    assert await storage.read(count) == 0


@only_postgres
async def test_two_writes_in_a_deadlock_both_succeed(db: Database, storage: Storage) -> None:
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
async def test_an_event_to_a_webhook_being_deleted_is_stored_without_it(
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
