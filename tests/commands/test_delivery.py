"""`worker` and `publish`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from tests.commands.running import DEEP, refused
from tests.conftest import ROOT, environment, manage, only_sqlite, running
from tests.databases import Place
from tests.receiver import Receiver

LOOPBACK = "127.0.0.0/8"


def test_a_worker_delivers_what_the_web_process_accepts(place: Place, receiver: Receiver) -> None:
    with running(place, RUN_WORKER="false") as server:
        server.register(url=f"{receiver.url}/hook")
        env = environment(DATABASE_URL=place.url, ALLOWED_NETWORKS=LOOPBACK)
        command = [sys.executable, str(ROOT / "manage.py"), "worker"]
        worker = subprocess.Popen(command, env=env, cwd=place.folder, stdout=subprocess.PIPE, text=True)
        try:
            accepted = server.client.post("/api/v1/events", json={"event_type": "game_started", "data": {"team": "ne"}})
            assert accepted.status_code == 202
            (got,) = receiver.wait_for(1)
            assert got.event_id == accepted.json()["event_id"]
        finally:
            worker.send_signal(signal.SIGTERM)
            assert "Hookline delivers" in worker.communicate(timeout=15)[0]
            assert worker.returncode == 0


def test_publish_stores_an_event_once_for_its_key(place: Place) -> None:
    first, second = (manage(place, "publish", "goal", '{"n": 1}', "--idempotency-key", "k") for _ in range(2))
    assert re.fullmatch(r"evt_\S+: 0 deliveries\n", first.stdout)
    assert second.stdout == first.stdout.strip() + ", published before\n"
    for data, reason in (("{", "DATA is not JSON"), ("[]", "data must be an object")):
        wrong = manage(place, "publish", "goal", data)
        assert wrong.returncode == 1
        assert reason in wrong.stderr and "Traceback" not in wrong.stderr


@only_sqlite
@pytest.mark.parametrize("data", [DEEP, '{"a":' * 20_000 + "1" + "}" * 20_000], ids=["open", "closed"])
def test_publish_refuses_deeply_nested_json_in_one_line(place: Place, data: str) -> None:
    refused(manage(place, "publish", "a", data), 1, "DATA is nested too deep")
