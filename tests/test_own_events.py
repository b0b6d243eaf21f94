"""Hookline's own events, `hookline.*`: who gets them, and who may not publish them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from peewee import Database

import hookline
from hookline import WebhookManager, clock, deliveries, events, history
from hookline.errors import Invalid
from hookline.events import NewEvent
from hookline.store.postgres import write_now
from hookline.worker import settling
from models import stored_time
from tests.conftest import SECRET, Server, manage
from tests.databases import Place
from tests.replaying import replayed

URL = "http://example.com/"
DISABLED = "hookline.webhook.disabled"


@pytest.fixture
def named(manager: WebhookManager) -> str:
    return manager.register(URL, [DISABLED], SECRET)


@pytest.fixture
def star(manager: WebhookManager) -> str:
    return manager.register(URL, ["*"], SECRET)


def disabled_event(db: Database, webhook_id: str) -> str:
    """Disable it as a worker does; the id of the event that tells of it."""
    write_now(db, settling.disable, [webhook_id], "it is gone", stored_time(clock.now()))
    return str(history.page(db, event_type=DISABLED)[0]["event_id"])


def reasons(db: Database, event_id: str) -> dict[str, str]:
    return {row["webhook_id"]: row["reason"] for row in history.explain(db, event_id)}


def test_a_customer_of_all_events_hears_of_nobody_elses_webhook(
    db: Database, manager: WebhookManager, named: str, star: str
) -> None:
    event_id = disabled_event(db, manager.register(URL, ["goal"], SECRET))
    assert [row["webhook_id"] for row in deliveries.page(db, event_id=event_id)] == [named]
    shown = reasons(db, event_id)
    assert (shown[named], shown[star]) == ("matched", "not subscribed")
    assert [row["webhook_id"] for row in manager.list(event=DISABLED)] == [named]
    assert {row["webhook_id"] for row in manager.list(event="goal")} >= {star}


def test_a_replay_brings_a_customer_of_all_events_none_of_ours(
    db: Database, manager: WebhookManager, star: str
) -> None:
    since = clock.now() - timedelta(minutes=1)
    disabled_event(db, manager.register(URL, ["goal"], SECRET))
    manager.update(star, {"enabled": False})
    events.publish_all(db, [NewEvent("goal", {}), NewEvent("Hookline.webhook.disabled", {"webhook_id": star})])
    manager.update(star, {"enabled": True})
    assert replayed(db, star, since) == 2
    assert {row["event_type"] for row in deliveries.page(db, webhook_id=star)} == {"goal", "Hookline.webhook.disabled"}


def test_a_replay_brings_webhook_disabled_of_earlier_releases_only_to_who_named_it(
    db: Database, manager: WebhookManager, star: str
) -> None:
    since = clock.now() - timedelta(minutes=1)
    by_name = manager.register(URL, ["webhook.disabled"], SECRET)
    for webhook_id in (star, by_name):
        manager.update(webhook_id, {"enabled": False})
    ours = NewEvent("webhook.disabled", {"webhook_id": "another's", "reason": "the endpoint answered 410 Gone"})
    theirs = NewEvent("webhook.disabled", {"hook": 1})
    events.publish_all(db, [ours, theirs])
    for webhook_id, number in ((star, 1), (by_name, 2)):
        manager.update(webhook_id, {"enabled": True})
        assert replayed(db, webhook_id, since) == number
    (made,) = deliveries.page(db, webhook_id=star)
    assert "another's" not in str(history.get(db, made["event_id"]))


def test_a_webhook_never_hears_of_itself_by_replay_neither(db: Database, manager: WebhookManager, named: str) -> None:
    since = clock.now() - timedelta(minutes=1)
    of_itself = disabled_event(db, named)
    of_another = disabled_event(db, manager.register(URL, ["goal"], SECRET))
    manager.update(named, {"enabled": True})
    assert replayed(db, named, since) == 1
    assert [row["event_id"] for row in deliveries.page(db, webhook_id=named)] == [of_another]
    assert reasons(db, of_itself)[named] == "about this webhook"


def test_a_test_event_goes_to_its_webhook_and_to_nobody_by_replay(
    db: Database, manager: WebhookManager, named: str, star: str
) -> None:
    other = manager.register(URL, ["hookline.webhook.test"], SECRET)
    tested = manager.send_test(named)
    assert [row["webhook_id"] for row in deliveries.page(db, event_id=tested.event_id)] == [named]
    for webhook_id in (star, other):
        assert replayed(db, webhook_id, clock.now() - timedelta(minutes=1)) == 0


def test_nobody_else_publishes_what_looks_like_ours(db: Database, manager: WebhookManager, named: str) -> None:
    for publish in (hookline.publish, manager.send_event):
        with pytest.raises(Invalid, match="hookline"):
            publish(DISABLED, {"webhook_id": "another"})
    assert manager.send_event("hookline", {}).deliveries == 0
    assert manager.send_event("hooklines.own", {}).deliveries == 0
    assert deliveries.page(db) == []


def test_the_command_line_and_http_refuse_them_in_one_sentence(server: Server, place: Place) -> None:
    answer = server.client.post("/api/v1/events", json={"event_type": DISABLED, "data": {}})
    assert answer.status_code == 422
    assert "must not begin with hookline." in answer.text
    refused = manage(place, "publish", DISABLED, "{}")
    assert refused.returncode == 1
    assert "must not begin with hookline." in refused.stderr and "Traceback" not in refused.stderr
