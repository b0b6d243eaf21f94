"""Many processes on one file, and a process killed in the middle: nothing acknowledged is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx

from hookline import WebhookManager
from hookline.store.open import open_database
from tests.conftest import ROOT, SECRET, Server
from tests.databases import Place

REGISTER_50 = """
import sys
from concurrent.futures import ThreadPoolExecutor
from hookline import WebhookManager
from hookline.store import schema
from hookline.store.open import open_database
db = open_database(sys.argv[1], create=True)
schema.up(db)
manager = WebhookManager(db=db)
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(5) as pool:
    for webhook_id in pool.map(lambda n: manager.register("http://example.com/", ["a"], sys.argv[2]), range(50)):
        print(webhook_id)
"""
KILLS = 4


def test_200_concurrent_registrations_from_several_processes_all_land(empty: Place) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REGISTER_50, empty.url, SECRET],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)  # they also race to create the tables
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60) for process in processes]
    waiting = "waiting for another process that works on this database"
    assert {line for _, errors in answers for line in errors.splitlines()} <= {waiting}
    ids = {line for printed, _ in answers for line in printed.split()}
    assert len(ids) == 200
    db = open_database(empty.url)
    assert set(WebhookManager(db=db).webhooks) == ids
    db.close_all()  # type: ignore[attr-defined]


def test_200_concurrent_registrations_over_http_all_land(server: Server) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: server.register(url=f"http://example.com/{n}"), range(200)))
    assert {answer.status_code for answer in answers} == {201}
    listed = server.client.get("/api/v1/webhooks/list").json()["webhooks"]
    assert {webhook["id"] for webhook in listed} == {answer.json()["webhook_id"] for answer in answers}


def test_what_was_acknowledged_is_there_after_a_kill(server: Server) -> None:
    acknowledged: list[str] = []
    for _ in range(KILLS):
        enough = threading.Event()
        before = len(acknowledged)

        def register_until_killed(enough: threading.Event = enough, before: int = before) -> None:
            for _ in range(2000):
                try:
                    acknowledged.append(server.register().json()["webhook_id"])
                except httpx.TransportError:
                    return
                if len(acknowledged) >= before + 40:
                    enough.set()

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(register_until_killed) for _ in range(4)]
            assert enough.wait(30)
            server.process.kill()
            for one in running:
                one.result()
        server.stop(signal.SIGKILL)
        server.start()
        listed = server.client.get("/api/v1/webhooks/list").json()["webhooks"]
        assert set(acknowledged) <= {webhook["id"] for webhook in listed}
    assert len(acknowledged) >= 40 * KILLS
