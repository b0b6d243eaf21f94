"""The pools: who holds a connection, who waits for one, and what is given back."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peewee import Database, OperationalError

from hookline.errors import Unavailable
from hookline.store.open import open_database, storage_of
from hookline.store.units import connected
from tests.conftest import only_postgres
from tests.databases import Place, Postgres, execute
from tests.store.connections import in_use, open_handles


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Database]:
    db = open_database(f"sqlite:///{tmp_path}/pool.db", create=True)
    with db.connection_context():
        db.execute_sql("CREATE TABLE numbers (number INTEGER)")
    yield db
    db.close_all()  # type: ignore[attr-defined]


def numbers(db: Database) -> list[int]:
    with connected(db):
        return [number for (number,) in db.execute_sql("SELECT number FROM numbers ORDER BY number").fetchall()]


def test_one_connection_serves_one_unit_of_work_after_the_other(pool: Database) -> None:
    seen = set()
    for _ in range(3):
        with connected(pool):
            seen.add(id(pool.connection()))
            with connected(pool):  # nested: the same one, and still open afterwards
                seen.add(id(pool.connection()))
            assert not pool.is_closed()
            assert in_use(pool) == 1
        assert pool.is_closed()
        assert open_handles(pool) == 1
    assert len(seen) == 1
    assert in_use(pool) == 0


def test_a_connection_that_the_caller_opened_stays_open_until_he_closes_it(pool: Database) -> None:
    pool.connect()
    with connected(pool):
        pass
    assert not pool.is_closed()
    assert not pool.connect(reuse_if_open=True)
    with pytest.raises(OperationalError, match="already opened"):
        pool.connect()
    assert pool.close()
    assert not pool.close()
    assert in_use(pool) == 0


def test_a_connection_in_a_transaction_is_not_given_back(pool: Database) -> None:
    with connected(pool), pool.atomic():
        with pytest.raises(OperationalError, match="transaction is open"):
            pool.close()
        pool.execute_sql("INSERT INTO numbers VALUES (1)")
    assert numbers(pool) == [1]


def test_a_transaction_that_was_begun_by_hand_is_rolled_back_before_the_next_use(pool: Database) -> None:
    with connected(pool):
        pool.execute_sql("BEGIN")
        pool.execute_sql("INSERT INTO numbers VALUES (1)")
    assert numbers(pool) == []


def test_a_thread_waits_for_a_connection_and_gets_the_first_that_is_given_back(tmp_path: Path) -> None:
    db = open_database(f"sqlite:///{tmp_path}/pool.db", create=True)
    db._max_connections = 2  # type: ignore[attr-defined]
    working, release = threading.Barrier(3), threading.Event()

    def work() -> None:
        with connected(db):
            working.wait(20)
            assert release.wait(20)

    def wait_for_one() -> int:
        with connected(db):
            return open_handles(db)

    with ThreadPoolExecutor(4) as threads:
        holding = [threads.submit(work) for _ in range(2)]
        working.wait(20)
        waiting = [threads.submit(wait_for_one) for _ in range(2)]
        assert open_handles(db) == 2
        release.set()
        assert [future.result(20) for future in waiting] == [2, 2]
        for future in holding:
            future.result(20)
    assert in_use(db) == 0


def test_closing_all_closes_what_other_threads_use_and_nothing_comes_back(pool: Database) -> None:
    using, closed = threading.Event(), threading.Event()

    def use() -> None:
        with connected(pool):
            using.set()
            assert closed.wait(20)

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(use)
        assert using.wait(20)
        pool.close_all()  # type: ignore[attr-defined]
        assert open_handles(pool) == 0
        closed.set()
        future.result(20)
    assert open_handles(pool) == 0
    assert numbers(pool) == []


def test_many_threads_share_the_pool(pool: Database) -> None:
    def insert(start: int) -> None:
        for number in range(start, start + 50):
            with connected(pool), pool.atomic():
                pool.execute_sql("INSERT INTO numbers VALUES (?)", (number,))
            assert number in numbers(pool)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(insert, range(0, 400, 50)))
    assert numbers(pool) == list(range(400))
    assert in_use(pool) == 0


@pytest.mark.postgres
def test_threads_with_a_connection_go_on_while_no_new_one_can_be_made() -> None:
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
def test_a_pool_closed_while_it_connects_leaves_no_connection_open(
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
