"""A small file system that fills up under the real server, and is given room again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import databases
from tests.conftest import running
from tests.databases import Place
from tests.receiver import Receiver


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    with databases.migrated("sqlite", folder) as place:
        yield place
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_503_that_stores_nothing_and_passes_when_there_is_room(small_disk: Place) -> None:
    with running(small_disk) as server:
        kept = server.register().json()["webhook_id"]
        filler = small_disk.folder / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)
        refused = [server.register(url="http://example.com/" + "x" * 1500) for _ in range(5)]
        assert {answer.status_code for answer in refused} == {503}
        assert all("nothing was stored" in answer.json()["detail"] for answer in refused)
        assert server.client.get(f"/api/v1/webhooks/{kept}").status_code == 200
        filler.unlink()
        assert server.register().status_code == 201
        assert len(server.client.get("/api/v1/webhooks/list").json()["webhooks"]) == 2


def test_deliveries_outlive_a_full_disk(small_disk: Place, receiver: Receiver) -> None:
    settings = {"ALLOWED_NETWORKS": "127.0.0.0/8", "LEASE": "3s", "DELIVERY_TIMEOUT": "1s"}
    event = {"event_type": "game_started", "data": {"team": "ne", "filling": "x" * 2000}}
    with running(small_disk, **settings) as server:
        server.register(url=f"{receiver.url}/hook")
        filler = small_disk.folder / "filler"
        filler.write_bytes(b"x" * 1_000_000)
        answers = [server.client.post("/api/v1/events", json=event)]
        while answers[-1].status_code == 202 and len(answers) < 500:
            answers.append(server.client.post("/api/v1/events", json=event))
        assert answers[-1].status_code == 503
        filler.unlink()
        answers.append(server.client.post("/api/v1/events", json=event))
        assert answers[-1].status_code == 202
        acknowledged = {answer.json()["event_id"] for answer in answers if answer.status_code == 202}
        deadline = time.monotonic() + 20
        while acknowledged - {one.event_id for one in receiver.received} and time.monotonic() < deadline:
            time.sleep(0.05)
    assert {one.event_id for one in receiver.received} == acknowledged
