"""The pool of SQLite connections: who holds one, who waits for one, and what is given back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from peewee import Database, OperationalError

from hookline.store.open import open_database
from hookline.store.units import connected
from tests.store.handles import in_use, open_handles


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
