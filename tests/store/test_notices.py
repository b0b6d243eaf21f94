"""Notices between processes on PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import socket

from peewee import Database

from hookline.store.notices import Notices
from hookline.store.open import open_database, storage_of
from hookline.store.storage import Storage
from tests.conftest import only_postgres
from tests.databases import Place, execute
from tests.store.connections import end_connections


@only_postgres
async def test_notices_are_heard_again_after_the_connection_was_lost(
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
async def test_a_socket_that_reuses_the_number_of_a_lost_one_is_left_alone(place: Place, db: Database) -> None:
    """libpq closes its socket while it reads, and in a busy process the next one opened gets its number."""
    loop, heard, read = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    async def nothing() -> None: ...

    notices = Notices(db, nothing)
    await notices.start()
    notices.listen(heard.set)
    await asyncio.wait_for(heard.wait(), 20)
    heard.clear()
    number, set_event = notices._socket, notices._disconnected.set
    ours, theirs = socket.socketpair()

    def opened_in_the_same_turn() -> None:
        os.dup2(ours.fileno(), number)
        loop.add_reader(number, read.set)
        set_event()

    notices._disconnected.set = opened_in_the_same_turn  # type: ignore[method-assign]
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    await asyncio.to_thread(
        execute, place.url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
    )
    await asyncio.wait_for(heard.wait(), 20)  # it listens again
    theirs.send(b"x")
    await asyncio.wait_for(read.wait(), 20)
    loop.remove_reader(number)
    os.close(number)
    ours.close()
    theirs.close()
    await notices.stop()
