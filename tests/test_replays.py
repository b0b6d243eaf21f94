"""Replays: recorded at once, carried out by workers in short steps, and nothing in them happens twice."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from peewee import Database
from uuid_utils import uuid7

from hookline import WebhookManager, clock, deliveries, events, lanes, missed, replays
from hookline.errors import Conflict, NotFound
from hookline.events import NewEvent
from hookline.store import sql, units
from hookline.store.open import open_database, storage_of
from hookline.store.postgres import write_now
from models import Delivery, Status, stored_time
from tests.conftest import SECRET, Server, only_postgres
from tests.databases import Place, plan, read_whole
from tests.replaying import carry_out
from tests.working import claim_up_to, until

URL = "http://127.0.0.1:9/"
LONG_AGO = clock.now() - timedelta(days=1)
ENDED: dict[str, Any] = {"leased": False, "next_attempt_at": None, "attempts": 1}


@pytest.fixture
def webhook_id(manager: WebhookManager) -> str:
    return manager.register(URL, ["goal"], SECRET)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missed, "WINDOW", 10)


def publish(db: Database, count: int, event_type: str = "goal", **data: Any) -> list[str]:
    published = events.publish_all(
        db, [NewEvent(event_type, {"n": n, **data}, own=event_type.startswith(events.OWN)) for n in range(count)]
    )
    return [answer.event_id for answer in published if not isinstance(answer, Exception)]


def end(db: Database, status: Status = Status.FAILED, *conditions: Any) -> None:
    """Let what waits (and meets the conditions) have ended so."""
    with db.connection_context():
        change = Delivery.update({**ENDED, "status": status, "finished_at": clock.now()})
        change.where(Delivery.status == Status.PENDING, *conditions).execute(db)


def store_events(db: Database, count: int, at: datetime) -> None:
    """Many events that nobody got."""
    statement = f"""
        INSERT INTO events (event_id, event_type, payload, created_at)
        SELECT id, 'goal', '{{}}', {sql.time(db, "at")} FROM {sql.values(db, "event_ids", "id")}"""
    event_ids = sql.encoded_ids(f"evt_{uuid7()}" for _ in range(count))
    with db.connection_context(), db.atomic():
        db.execute_sql(statement, {"at": stored_time(at), "event_ids": event_ids})


def pending(db: Database) -> int:
    with db.connection_context():
        return int(Delivery.select().where(Delivery.status == Status.PENDING).count(db))


def test_a_replay_counts_first_and_brings_back_what_did_not_arrive(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    start = clock.now()
    publish(db, 1)
    end(db, Status.SUCCEEDED)
    publish(db, 1)
    end(db)
    manager.update(webhook_id, {"enabled": False})
    publish(db, 1)
    publish(db, 1, "other")
    with pytest.raises(Conflict, match="disabled"):
        replays.start(db, webhook_id, start)
    assert manager.update(webhook_id, {"enabled": True})["replay"]["deliveries"] == 1  # the other failed before
    assert missed.count(db, webhook_id, start) == {"deliveries": 2, "more": False}
    assert missed.count(db, webhook_id, start, status="all") == {"deliveries": 3, "more": False}
    assert missed.count(db, webhook_id, clock.now()) == {"deliveries": 0, "more": False}
    assert pending(db) == 0
    started = replays.start(db, webhook_id, start)
    assert (started["state"], started["deliveries"], started["position"], pending(db)) == ("running", 0, start, 0)
    assert carry_out(db) == 2
    done = replays.get(db, started["replay_id"])
    assert (done["state"], done["deliveries"], done["position"]) == ("finished", 2, done["until"])
    assert pending(db) == 2
    replays.start(db, webhook_id, start)
    assert carry_out(db) == 0  # they are on their way
    end(db, Status.SUCCEEDED)
    replays.start(db, webhook_id, start, status="all")
    assert carry_out(db) == 3


def test_a_replay_minds_the_team(db: Database, manager: WebhookManager) -> None:
    for data in ({"home_team": "ne"}, {"home_team": "buf"}, {}):
        manager.send_event("goal", data)
    for team, count in (("ne", 1), (None, 3)):
        webhook_id = manager.register(URL, ["goal"], SECRET, team)
        assert missed.count(db, webhook_id, LONG_AGO)["deliveries"] == count


def test_a_replay_brings_no_events_of_the_service_to_who_did_not_name_them(
    db: Database, manager: WebhookManager
) -> None:
    everything, named = manager.register(URL, ["*"], SECRET), manager.register(URL, ["hookline.some"], SECRET)
    about_it, other = publish(db, 1, "hookline.some", webhook_id=named), publish(db, 1, "hookline.some")
    manager.send_test(named)
    with db.connection_context():
        Delivery.delete().execute(db)
    replays.start(db, everything, LONG_AGO)
    assert carry_out(db) == 0
    replays.start(db, named, LONG_AGO)
    assert carry_out(db) == 1
    assert [row["event_id"] for row in deliveries.page(db)] == other
    assert about_it != other


def test_a_replay_keeps_to_its_window_and_ends(db: Database, webhook_id: str) -> None:
    publish(db, 1)
    end(db)
    since = clock.now()
    publish(db, 2)
    end(db)
    until = clock.now()
    publish(db, 1)
    end(db)
    replays.start(db, webhook_id, since, until)
    assert carry_out(db) == 2
    end(db)
    replay = replays.start(db, webhook_id, since, clock.now() + timedelta(days=1))
    assert replay["until"] <= clock.now()  # what is published from now on is not its business
    publish(db, 1)
    end(db)
    assert carry_out(db) == 3
    backwards = replays.start(db, webhook_id, until, since)
    assert carry_out(db) == 0
    assert replays.get(db, backwards["replay_id"])["state"] == "finished"


def test_what_fails_again_or_succeeds_again_is_not_brought_back_by_the_same_replay(
    db: Database, webhook_id: str, small_windows: None
) -> None:
    publish(db, 25)
    end(db)
    replay_id = replays.start(db, webhook_id, LONG_AGO, status="all")["replay_id"]
    while step := replays.find(db, replay_id):
        assert replays.record(db, step)
        end(db)
    assert replays.get(db, replay_id)["deliveries"] == 25


def test_a_step_makes_at_most_a_window_due_and_passes_what_is_of_others(
    db: Database, manager: WebhookManager, small_windows: None
) -> None:
    publish(db, 35, "other")
    publish(db, 25)
    publish(db, 30, "other")
    webhook_id = manager.register(URL, ["goal"], SECRET)
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    made = []
    while step := replays.find(db, replay_id):
        assert replays.record(db, step)
        made.append(pending(db))
    assert made == [5, 15, 25, 25]  # and the events of others before and behind in few steps
    assert replays.get(db, replay_id)["state"] == "finished"


def test_of_two_workers_at_one_step_the_late_one_changes_nothing(
    db: Database, webhook_id: str, small_windows: None
) -> None:
    publish(db, 25)
    end(db)
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    step = replays.find(db, replay_id)
    assert step is not None
    assert [write_now(db, replays.record, step) for _ in range(2)] == [True, False]
    end(db)  # they have failed again: the late one must not bring them back either
    assert not write_now(db, replays.record, step)
    assert (pending(db), replays.get(db, replay_id)["deliveries"]) == (0, 10)


def test_many_workers_at_once_make_each_delivery_once(
    db: Database, manager: WebhookManager, small_windows: None
) -> None:
    publish(db, 200)
    webhook_id = manager.register(URL, ["goal"], SECRET)
    replays.start(db, webhook_id, LONG_AGO)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: carry_out(db), range(3)))
    (replay,) = replays.page(db)
    assert (replay["state"], replay["deliveries"], pending(db)) == ("finished", 200, 200)


def test_a_step_that_is_cut_off_in_the_middle_loses_and_repeats_nothing(
    db: Database, webhook_id: str, small_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(db, 25)
    end(db)
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]

    def cut_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for module, name in ((deliveries, "insert"), (lanes, "open_lanes")):
        step = replays.find(db, replay_id)
        assert step is not None
        with monkeypatch.context() as patch:
            patch.setattr(module, name, cut_off)
            with pytest.raises(KeyboardInterrupt):
                write_now(db, replays.record, step)
        shown = replays.get(db, replay_id)
        assert (pending(db), shown["deliveries"]) == (shown["deliveries"], shown["deliveries"])
        assert write_now(db, replays.record, step)
    assert carry_out(db) == 25
    assert pending(db) == 25


def test_what_changed_between_the_look_and_the_step_stays_as_it_is(db: Database, webhook_id: str) -> None:
    publish(db, 3)
    end(db)
    newest, middle, oldest = (row["delivery_id"] for row in deliveries.page(db))
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    step = replays.find(db, replay_id)
    assert step is not None and step.window.ended == [oldest, middle, newest]
    deliveries.retry(db, oldest)
    deliveries.retry(db, middle)
    end(db, Status.SUCCEEDED, Delivery.delivery_id == middle)
    assert write_now(db, replays.record, step)
    statuses = [row["status"] for row in deliveries.page(db)]
    assert (statuses, replays.get(db, replay_id)["deliveries"]) == (["pending", "succeeded", "pending"], 1)


def test_a_replay_is_cancelled_by_request_once(db: Database, webhook_id: str, small_windows: None) -> None:
    publish(db, 25)
    end(db)
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    first = replays.find(db, replay_id)
    assert first is not None and replays.record(db, first)
    second = replays.find(db, replay_id)
    cancelled = replays.cancel(db, replay_id)
    assert (cancelled["state"], cancelled["reason"]) == ("cancelled", "cancelled by request")
    assert second is not None and not replays.record(db, second)
    assert (pending(db), replays.running(db), replays.find(db, replay_id)) == (10, [], None)
    with pytest.raises(Conflict, match="cancelled already"):
        replays.cancel(db, replay_id)


def test_a_replay_of_a_webhook_that_is_disabled_or_deleted_ends(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    other = manager.register(URL, ["goal"], SECRET)
    publish(db, 5)
    end(db)
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    gone = replays.start(db, other, LONG_AGO)["replay_id"]
    step = replays.find(db, gone)
    manager.update(webhook_id, {"enabled": False})
    manager.unregister(other)
    assert step is not None and not replays.record(db, step)
    assert carry_out(db) == 0
    ended = replays.get(db, replay_id)
    assert (ended["state"], ended["reason"], pending(db)) == ("cancelled", "the webhook was disabled", 0)
    with pytest.raises(NotFound):
        replays.get(db, gone)
    for unknown in (replays.get, replays.cancel):
        with pytest.raises(NotFound):
            unknown(db, "rpl_x")
    with pytest.raises(NotFound):
        replays.start(db, other, LONG_AGO)


def test_a_replay_opens_a_lane_that_rests_once(db: Database, webhook_id: str, small_windows: None) -> None:
    def rest() -> None:
        with db.connection_context():
            far = stored_time(clock.now() + timedelta(hours=1))
            statement = f"""
                INSERT INTO lanes (webhook_id, due_at, open_at, failures)
                VALUES ({sql.param(db, "webhook_id")}, {sql.time(db, "far")}, {sql.time(db, "far")}, 1)
                ON CONFLICT (webhook_id) DO UPDATE SET due_at = excluded.due_at, open_at = excluded.open_at"""
            db.execute_sql(statement, {"webhook_id": webhook_id, "far": far})

    def claimable() -> int:
        with db.connection_context(), db.atomic():
            return len(claim_up_to(db, 10))

    publish(db, 25)
    end(db)
    rest()
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    assert (step := replays.find(db, replay_id)) is not None and replays.record(db, step)
    assert claimable() > 0
    rest()  # it failed again
    carry_out(db)
    assert claimable() == 0


def test_a_replay_keeps_strict_order(db: Database, manager: WebhookManager) -> None:
    ids = publish(db, 25)
    webhook_id = manager.register(URL, ["goal"], SECRET)
    manager.update(webhook_id, {"ordered": True})
    replays.start(db, webhook_id, LONG_AGO)
    assert carry_out(db) == 25
    assert [row["event_id"] for row in reversed(deliveries.page(db))] == ids
    with db.connection_context(), db.atomic():
        (job,) = claim_up_to(db, 10)
    assert job.event_id == ids[0]


def test_replays_are_listed_newest_first(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    other = manager.register(URL, ["goal"], SECRET)
    ids = [replays.start(db, owner, LONG_AGO)["replay_id"] for owner in (webhook_id, other, webhook_id)]
    assert [row["replay_id"] for row in replays.page(db)] == ids[::-1]
    assert [row["replay_id"] for row in replays.page(db, webhook_id=webhook_id)] == [ids[2], ids[0]]
    assert [row["replay_id"] for row in replays.page(db, limit=1, before=ids[2])] == [ids[1]]
    replays.cancel(db, ids[0])
    assert [row["replay_id"] for row in replays.page(db, state="cancelled")] == [ids[0]]


def test_what_was_missed_begins_with_the_first_event_that_did_not_arrive(
    db: Database, manager: WebhookManager, webhook_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it waited since before the endpoint began to fail; but not what had failed before."""
    now = clock.now()
    hours = iter(range(-20, 1))

    def publish_at_the_next_hour() -> datetime:
        moment = now + timedelta(hours=next(hours))
        monkeypatch.setattr(clock, "now", lambda: moment)
        publish(db, 1)
        return moment

    before = [publish_at_the_next_hour() for _ in range(5)]
    end(db)
    waited = [publish_at_the_next_hour() for _ in range(5)]
    began = waited[-1] + timedelta(minutes=30)
    during = [publish_at_the_next_hour() for _ in range(5)]
    monkeypatch.setattr(clock, "now", lambda: now)
    end(db)
    assert missed.since(db, webhook_id, began) == {"since": waited[0], "deliveries": 10, "more": False}
    assert missed.since(db, webhook_id, during[-1] + timedelta(minutes=30))["deliveries"] == 10  # they ended at once
    late = clock.now() + timedelta(hours=1)
    monkeypatch.setattr(clock, "now", lambda: late)
    assert missed.since(db, webhook_id, late) == {"since": late, "deliveries": 0, "more": False}
    assert len(before) == 5


def test_enabling_a_webhook_that_missed_20_000_events_says_more_than_10_000(server: Server, db: Database) -> None:
    webhook_id = server.register(team=None, events=["goal"]).json()["webhook_id"]
    path = f"/api/v1/webhooks/{webhook_id}"
    assert server.client.patch(path, json={"enabled": False}).status_code == 200
    store_events(db, 20_000, clock.now())
    answer = server.client.patch(path, json={"enabled": True})
    shown = answer.json()["replay"]
    assert (answer.status_code, shown["deliveries"], shown["more"]) == (200, 10_000, True)
    counted = server.client.post(f"{path}/replay", json={"since": shown["since"], "dry_run": True})
    assert (counted.status_code, counted.json()) == (
        200,
        {"webhook_id": webhook_id, "deliveries": 10_000, "more": True, "dry_run": True},
    )


def test_nothing_that_grows_with_what_was_missed_runs_in_the_writers_transaction(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    publish(db, 3)
    manager.update(webhook_id, {"enabled": False})
    end(db, Status.CANCELLED)
    publish(db, 3)
    inside: list[tuple[str, Any]] = []

    def note(event: Any) -> None:
        if units.in_unit(db):
            inside.append((event.sql, event.params))

    db.query_hooks.append(note)
    assert manager.update(webhook_id, {"enabled": True})["replay"]["deliveries"] == 6
    db.query_hooks.remove(note)
    assert inside
    assert not [statement for statement, _ in inside if "FROM events" in statement or "count(" in statement.lower()]
    looked_at = [statement for statement, _ in inside if "FROM deliveries" in statement]
    assert all("LIMIT" in statement or lanes.making_in_order_sql("lanes") in statement for statement in looked_at)


def test_counting_ends_after_so_many_events_of_others(
    db: Database, manager: WebhookManager, small_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missed, "WINDOWS_COUNTED", 3)
    publish(db, 5)
    publish(db, 20, "other")
    webhook_id = manager.register(URL, ["goal"], SECRET)
    assert missed.count(db, webhook_id, LONG_AGO) == {"deliveries": 5, "more": False}
    publish(db, 10, "other")
    assert missed.count(db, webhook_id, LONG_AGO) == {"deliveries": 5, "more": True}


def test_looking_counting_and_each_step_seek(db: Database, manager: WebhookManager, webhook_id: str) -> None:
    publish(db, 3)
    end(db)
    publish(db, 3, "other")
    manager.update(webhook_id, {"events": ["goal", "other"], "team": None})
    steps: list[str] = []

    def explain(event: Any) -> None:
        text = event.sql.strip()
        if "FOR NO KEY" not in text and text.startswith(("SELECT", "UPDATE", "INSERT", "WITH")):
            steps.extend(plan(db, event.sql, event.params or ()))

    replays.start(db, webhook_id, LONG_AGO)
    db.query_hooks.append(explain)
    with db.connection_context():
        assert missed.since(db, webhook_id, LONG_AGO)["deliveries"] == 6
        assert carry_out(db) == 6
        replays.page(db, webhook_id=webhook_id)
    db.query_hooks.remove(explain)
    assert any("idx_events_created" in step for step in steps)
    assert any("idx_deliveries_event" in step for step in steps)
    for table, alias in (("events", "e"), ("deliveries", "d"), ("webhooks", "w"), ("lanes", "l")):
        assert read_whole(steps, table, alias) == []


@only_postgres
async def test_a_step_waits_briefly_for_a_webhook_that_somebody_holds_and_goes_on_later(
    place: Place, db: Database, webhook_id: str
) -> None:
    publish(db, 3)
    end(db)
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    storage, other = storage_of(db), open_database(place.url)
    await storage.start()
    with other.connection_context(), other.atomic():
        other.execute_sql("SELECT 1 FROM webhooks FOR UPDATE").fetchall()
        assert not await replays.carry_out_steps(storage)  # it gave way, and says that it goes on later
        assert (pending(db), replays.running(db)) == (0, [replay_id])
    keeping = asyncio.ensure_future(replays.carry_out(storage, poll=0.01))
    await until(lambda: replays.get(db, replay_id)["state"] == "finished")
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await storage.stop()
    other.close_all()  # type: ignore[attr-defined]
    assert pending(db) == 3


@only_postgres
async def test_replays_go_on_after_a_look_for_them_has_failed(db: Database, webhook_id: str) -> None:
    """One that PostgreSQL calls the programmer's error ended the task, in silence: nothing was replayed any more."""
    publish(db, 3)
    end(db)
    replay_id = replays.start(db, webhook_id, LONG_AGO)["replay_id"]
    storage = storage_of(db)
    await storage.start()
    await storage.write(lambda db: db.execute_sql("ALTER TABLE replays RENAME TO away"))
    assert not await replays.carry_out_steps(storage)
    await storage.write(lambda db: db.execute_sql("ALTER TABLE away RENAME TO replays"))
    assert await replays.carry_out_steps(storage)
    await storage.stop()
    assert (replays.get(db, replay_id)["state"], pending(db)) == ("finished", 3)


def test_a_replay_over_http_tells_how_far_it_is_and_is_cancelled(server: Server) -> None:
    client = server.client
    webhook_id = server.register(team=None).json()["webhook_id"]
    path = f"/api/v1/webhooks/{webhook_id}"
    body = {"since": "2020-01-01T00:00:00Z"}
    begun = client.post(f"{path}/replay", json=body)
    shown = begun.json()
    assert (begun.status_code, begun.headers["location"]) == (202, f"/api/v1/replays/{shown['replay_id']}")
    assert {name: shown[name] for name in ("webhook_id", "status", "since", "deliveries", "reason")} == {
        "webhook_id": webhook_id,
        "status": "failed",
        "since": "2020-01-01T00:00:00Z",
        "deliveries": 0,
        "reason": None,
    }
    for _ in range(2000):
        now = client.get(begun.headers["location"]).json()
        if now["state"] != "running":
            break
    assert (now["state"], now["position"]) == ("finished", now["until"])
    refused = client.post(f"{begun.headers['location']}/cancel")
    assert (refused.status_code, refused.json()) == (409, {"detail": "this replay is finished already"})
    more = client.post(f"{path}/replay", json=body).json()["replay_id"]
    listed = client.get("/api/v1/replays", params={"webhook_id": webhook_id, "limit": 1}).json()
    assert [row["replay_id"] for row in listed["data"]] == [more]
    rest = client.get("/api/v1/replays", params={"webhook_id": webhook_id, "cursor": listed["next_cursor"]}).json()
    assert [row["replay_id"] for row in rest["data"]] == [shown["replay_id"]]
    assert client.patch(path, json={"enabled": False}).status_code == 200
    assert client.post(f"{path}/replay", json=body).status_code == 409
    for method, unknown in (("POST", "webhooks/x/replay"), ("GET", "replays/x"), ("POST", "replays/x/cancel")):
        answer = client.request(method, f"/api/v1/{unknown}", json=body if "replay" in unknown[9:] else None)
        assert (answer.status_code, list(answer.json())) == (404, ["detail"])
    assert client.get("/api/v1/replays", params={"state": "x"}).status_code == 422
    assert client.get("/api/v1/replays", params={"cursor": "x"}).status_code == 422
