"""A small file system that fills up under the real server, and is given room again."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import databases
from tests.conftest import running
from tests.databases import Place, Postgres, execute, named
from tests.receiver import Receiver
from tests.working import wait_until


@dataclass(frozen=True)
class SmallDisk:
    """A database on a file system of its own, and a file there that takes its room."""

    place: Place
    filler: Path

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)


@pytest.fixture
def small_disk(backend: str, tmp_path: Path) -> Iterator[SmallDisk]:
    make = small_sqlite if backend == "sqlite" else small_postgres
    with make(tmp_path) as disk:
        yield disk


@contextmanager
def small_sqlite(folder: Path) -> Iterator[SmallDisk]:
    disk = folder / "disk"
    disk.mkdir()
    with mounted(disk, "2m"), databases.migrated("sqlite", disk) as place:
        yield SmallDisk(place, disk / "filler")


@contextmanager
def small_postgres(folder: Path) -> Iterator[SmallDisk]:
    """The tables are on the small disk; PostgreSQL's log of writes is not: without room for that it stops."""
    disk = Path(tempfile.mkdtemp(prefix="hookline-disk-"))  # where PostgreSQL's user can go, unlike pytest's folder
    server = Postgres().start()
    try:
        with mounted(disk, "20m"):
            if server.user:  # the tests run as root
                shutil.chown(disk, server.user)
            execute(server.url, f"CREATE TABLESPACE small LOCATION '{disk}'")
            execute(server.url, "CREATE DATABASE hookline TABLESPACE small")
            place = Place(named(server.url, "hookline"), folder)
            databases.migrate(place.url)
            yield SmallDisk(place, disk / "filler")
            server.stop()
    finally:
        server.stop()
        disk.rmdir()


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_503_that_stores_nothing_and_passes_when_there_is_room(small_disk: SmallDisk) -> None:
    with running(small_disk.place) as server:
        kept = server.register().json()["webhook_id"]
        small_disk.fill()
        long = "http://example.com/" + "x" * 1500
        answers = [server.register(url=long) for _ in range(40)]  # the first ones may find room in a page
        stored = [answer.json()["webhook_id"] for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code != 201]
        assert refused == answers[-len(refused) :] != []
        assert {answer.status_code for answer in refused} == {503}
        assert {answer.json()["detail"] for answer in refused} == {"the disk is full; nothing was stored"}
        assert server.client.get(f"/api/v1/webhooks/{kept}").status_code == 200
        small_disk.filler.unlink()
        last = server.register()
        assert last.status_code == 201
        listed = server.client.get("/api/v1/webhooks/list").json()["webhooks"]
        assert {webhook["id"] for webhook in listed} == {kept, *stored, last.json()["webhook_id"]}


def test_deliveries_outlive_a_full_disk(small_disk: SmallDisk, receiver: Receiver) -> None:
    settings = {"ALLOWED_NETWORKS": "127.0.0.0/8", "LEASE": "3s", "DELIVERY_TIMEOUT": "1s"}
    event = {"event_type": "game_started", "data": {"team": "ne", "filling": "x" * 2000}}
    with running(small_disk.place, **settings) as server:
        server.register(url=f"{receiver.url}/hook")
        answers = [server.client.post("/api/v1/events", json=event)]
        small_disk.fill()
        small_disk.filler.write_bytes(b"x" * (small_disk.filler.stat().st_size - 200_000))
        while answers[-1].status_code == 202 and len(answers) < 500:
            answers.append(server.client.post("/api/v1/events", json=event))
        assert answers[-1].status_code == 503
        small_disk.filler.unlink()
        answers.append(server.client.post("/api/v1/events", json=event))
        assert answers[-1].status_code == 202
        acknowledged = {answer.json()["event_id"] for answer in answers if answer.status_code == 202}
        wait_until(lambda: acknowledged <= {request.event_id for request in receiver.received}, 20)
    assert {one.event_id for one in receiver.received} == acknowledged
