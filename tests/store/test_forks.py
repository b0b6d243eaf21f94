"""Children of a fork on real databases: what they acknowledge is there, their parent's connections are untouched."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from tests.conftest import ROOT, SECRET, environment, only_postgres
from tests.databases import Place, execute

HEAD = """
import multiprocessing, os, signal, sys, threading
from peewee import PostgresqlDatabase, SqliteDatabase
import models
from hookline import WebhookManager, publish
from hookline.errors import Unavailable

url, secret = sys.argv[1:3]
done, gone = os.pipe(), os.pipe()

def publish_20(send, end):
    os.close(gone[1])
    for number in range(20):
        if number == 10:
            os.write(done[1], b"x")
            os.read(gone[0], 1)  # until the parent has closed its database, or has ended
        assert send("a", {"n": number}).event_id
    end()
"""

ACKNOWLEDGES = (
    HEAD
    + """
way, start, end = sys.argv[3:]
manager = WebhookManager(url)
manager.register("http://example.com/", ["a"], secret)
send = publish if way == "publish" else manager.send_event
send("a", {"of": "the parent"})
held = way == "held" and manager.db.connect()  # this thread's connection is open while it forks
finish = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if end == "killed" else lambda: os._exit(0)
if start == "os.fork":
    if os.fork() == 0:
        publish_20(send, finish)
else:
    process = multiprocessing.get_context("fork").Process(target=publish_20, args=(send, finish))
    process.start()
os.read(done[0], 1)
if held:
    assert manager.db.execute_sql("SELECT 1").fetchone() == (1,)  # it is still good
manager.db.close_all()
if start != "os.fork":
    os.close(gone[1])
    process.join()
"""
)


def run(script: str, place: Place, *arguments: str) -> str:
    """What the script and its children print; returns when all of them have ended."""
    command = [sys.executable, "-c", script, place.url, SECRET, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def rows(place: Place, statement: str) -> list[Any]:
    if place.url.startswith("postgresql"):
        return execute(place.url, statement)
    with closing(sqlite3.connect(place.file)) as connection:
        return connection.execute(statement).fetchall()


def events(place: Place) -> int:
    return int(rows(place, "SELECT count(*) FROM events")[0][0])


@pytest.mark.parametrize(
    ("way", "start", "end"),
    [
        ("manager", "os.fork", "killed"),
        ("manager", "multiprocessing", "killed"),
        ("publish", "multiprocessing", "exits"),
        ("held", "os.fork", "exits"),
    ],
)
def test_a_child_of_a_fork_loses_nothing_it_acknowledged(place: Place, way: str, start: str, end: str) -> None:
    run(ACKNOWLEDGES, place, way, start, end)
    assert events(place) == 21


OF_THE_CALLER = (
    HEAD
    + """
if url.startswith("sqlite"):
    db = SqliteDatabase(url.removeprefix("sqlite:///"), pragmas={"foreign_keys": 1, "journal_mode": "wal"})
else:
    db = PostgresqlDatabase(url, prefer_psycopg3=True)
models.db.initialize(db)
db.connect()
publish("a", {})
if os.fork() == 0:
    publish_20(publish, lambda: os._exit(0))
os.read(done[0], 1)
publish("a", {})  # its connection is still good
db.close()
"""
)


def test_a_child_of_a_fork_loses_nothing_on_a_database_of_the_callers_own(place: Place) -> None:
    run(OF_THE_CALLER, place)
    assert events(place) == 22


WHILE_OTHERS_WORK = (
    HEAD
    + """
manager = WebhookManager(url)
forked, children = threading.Event(), []

def work():
    while not forked.is_set():
        publish("a", {"of": "a thread"})

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(3):
    child = os.fork()
    if child == 0:
        for number in range(20):
            publish("b", {"n": number})
        os._exit(0)
    children.append(child)
forked.set()
for thread in threads:
    thread.join()
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""
)


def test_a_process_whose_threads_publish_may_fork(place: Place) -> None:
    run(WHILE_OTHERS_WORK, place)
    assert rows(place, "SELECT count(*) FROM events WHERE event_type = 'b'") == [(60,)]


IN_A_TRANSACTION = (
    HEAD
    + """
from hookline.store import forks
forks.WAIT = 0.1
manager = WebhookManager(url)
began, finish = threading.Event(), threading.Event()

def transact():
    with manager.db.connection_context(), manager.db.atomic():
        publish("of the parent", {})
        began.set()
        finish.wait(20)

def child():
    try:
        for number in range(20):
            publish("a", {"n": number})
        print("stored")
    except Unavailable as exc:
        print("refused:", exc)
    sys.stdout.flush()
    os._exit(0)

def fork():
    pid = os.fork()
    if pid == 0:
        child()
    assert os.waitpid(pid, 0)[1] == 0

if sys.argv[3] == "thread":
    thread = threading.Thread(target=transact)
    thread.start()
    began.wait(20)
    fork()
    finish.set()
    thread.join()
else:
    with manager.db.connection_context(), manager.db.atomic():
        publish("of the parent", {})
        fork()
publish("of the parent", {})
"""
)


@pytest.mark.parametrize("whose", ["thread", "own"])
def test_a_fork_in_the_middle_of_a_transaction_acknowledges_nothing_that_is_lost(
    backend: str, place: Place, whose: str
) -> None:
    printed = run(IN_A_TRANSACTION, place, whose)
    stored = rows(place, "SELECT event_type, count(*) FROM events GROUP BY event_type ORDER BY event_type")
    if backend == "postgres":
        assert printed == "stored\n"
        assert stored == [("a", 20), ("of the parent", 2)]
    else:
        assert printed.startswith("refused: this process was forked while its parent used this SQLite database")
        assert stored == [("of the parent", 2)]


STORAGES = (
    HEAD
    + """
import asyncio
manager = WebhookManager(url)

async def child_of_a_service():
    await manager.startup()
    manager.register("http://example.com/", ["a"], secret)
    pid = os.fork()
    if pid == 0:
        os._exit(outcome())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    await manager._worker.storage.write(lambda db: publish("a", {"of": "the parent"}))
    await manager.shutdown()

def outcome():
    async def writes():
        storage = manager_storage
        try:
            await storage.write(lambda db: publish("a", {}))
        except Unavailable as exc:
            assert "forked" in str(exc), exc
            return 0
        return 1
    manager_storage = storage_of_the_parent()
    assert publish("a", {"of": "the child"}).deliveries == 1
    asyncio._set_running_loop(None)
    return asyncio.run(writes())

def storage_of_the_parent():
    import gc
    from hookline.store.storage import Storage
    return next(one for one in gc.get_objects() if isinstance(one, Storage))

asyncio.run(child_of_a_service())
"""
)


def test_a_storage_of_the_parent_takes_nothing_in_a_child(place: Place) -> None:
    run(STORAGES, place)
    assert events(place) == 2
    # What the child published is not leased to its parent's worker, which knows nothing of it.
    assert rows(place, "SELECT count(*) FROM deliveries WHERE status = 'pending' AND leased") == [(0,)]


BESIDE_A_SERVICE = (
    HEAD
    + """
import asyncio
manager = WebhookManager(url)

def fork():
    child = os.fork()
    if child == 0:
        for number in range(20):
            publish("b", {"n": number})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

async def serve():
    await manager.startup()
    await asyncio.to_thread(fork)
    await manager.shutdown()

asyncio.run(serve())
"""
)


def test_a_thread_beside_a_running_service_may_fork(place: Place) -> None:
    run(BESIDE_A_SERVICE, place)
    assert events(place) == 20


CONNECTS = (
    HEAD
    + """
manager = WebhookManager(url)
publish("a", {})
if os.fork() == 0:
    with manager.db._lock:  # as Peewee does while a thread waits for a server that does not answer
        other = threading.Thread(target=publish, args=("a", {}), daemon=True)
        other.start()
        other.join(10)
        os._exit(other.is_alive())
assert os.wait()[1] == 0
"""
)


@only_postgres
def test_a_child_whose_thread_waits_for_a_new_connection_goes_on_with_those_it_has(place: Place) -> None:
    run(CONNECTS, place)
