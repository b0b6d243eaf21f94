"""Workers killed in the middle of a replay."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from peewee import Database

from hookline import WebhookManager, clock, events
from hookline.events import NewEvent
from models import Delivery, Status
from tests.conftest import SECRET, Server, running
from tests.databases import Place
from tests.faults.load import worker
from tests.working import wait_until

EACH = 3000
KILLS = 2


def test_a_replay_whose_workers_are_killed_again_and_again_loses_and_repeats_nothing(
    place: Place, db: Database, manager: WebhookManager
) -> None:
    failed = manager.register("http://192.0.2.1/", ["goal"], SECRET)  # refused, and then its lane rests
    publish(db)
    with db.connection_context():
        ended = {"status": Status.FAILED, "leased": False, "next_attempt_at": None, "finished_at": clock.now()}
        Delivery.update(ended).execute(db)
    manager.update(failed, {"enabled": False})
    publish(db)
    manager.update(failed, {"enabled": True})
    since = (clock.now() - timedelta(days=1)).isoformat()
    with running(place, RUN_WORKER="false") as server:
        begun = server.client.post(f"/api/v1/webhooks/{failed}/replay", json={"since": since})
        path = begun.headers["location"]
        for _ in range(KILLS):
            before = server.client.get(path).json()["deliveries"]
            with worker(place) as process:
                wait_for_more(server, path, before)
                process.kill()
                process.wait(10)
            with db.connection_context():
                pending = Delivery.select().where(Delivery.status == Status.PENDING).count(db)
            assert server.client.get(path).json()["deliveries"] == pending
        with worker(place):
            done = wait_for_more(server, path, 2 * EACH)
    assert (done["state"], done["deliveries"]) == ("finished", 2 * EACH)
    with db.connection_context():
        assert Delivery.select().where(Delivery.status == Status.PENDING).count(db) == 2 * EACH


def publish(db: Database) -> None:
    for _ in range(EACH // 500):
        events.publish_all(db, [NewEvent("goal", {"n": n}) for n in range(500)])


def wait_for_more(server: Server, path: str, before: int) -> dict[str, Any]:
    """Until the replay has made more due than that, or has ended."""

    def moved() -> dict[str, Any] | None:
        shown: dict[str, Any] = server.client.get(path).json()
        return shown if shown["deliveries"] > before or shown["state"] != "running" else None

    return wait_until(moved)
