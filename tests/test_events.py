"""Publishing: who gets an event, its exact bytes, idempotency, and the caller's own transaction."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peewee import Database

import hookline
import models
from hookline import WebhookManager, clock, deliveries, events, history, lanes
from hookline.errors import Conflict, Invalid, TooLarge
from hookline.events import NewEvent, Published
from hookline.lanes import Slots
from models import Event
from tests.conftest import SECRET, recorded
from tests.databases import plan, read_whole
from tests.outlets import outlet


def delivered_to(db: Database, published: Published) -> set[str]:
    return {row["webhook_id"] for row in deliveries.page(db, event_id=published.event_id, limit=200)}


def payload(db: Database, event_id: str) -> str:
    with db.connection_context():
        return str(Event.select(Event.payload).where(Event.event_id == event_id).scalar(db))


def lane_ids(db: Database) -> list[str]:
    with db.connection_context():
        return [row[0] for row in db.execute_sql("SELECT webhook_id FROM lanes").fetchall()]


@pytest.mark.parametrize(
    ("types", "team", "data", "matches"),
    [
        (["goal"], None, {}, True),
        (["goal"], None, {"team": "ne"}, True),
        (["*"], None, {}, True),
        (["goal", "*"], None, {}, True),
        (["other"], None, {}, False),
        ([], None, {}, False),
        (["goal"], "ne", {}, False),
        (["goal"], "ne", {"home_team": "ne"}, True),
        (["goal"], "ne", {"away_team": "ne"}, True),
        (["*"], "ne", {"team": "ne"}, True),
        (["goal"], "ne", {"home_team": "buf", "away_team": "nyj"}, False),
        (["goal"], "ne", {"home_team": ["ne"]}, False),
    ],
)
def test_a_webhook_gets_its_types_and_its_team(
    manager: WebhookManager, types: list[str], team: str | None, data: dict[str, Any], matches: bool
) -> None:
    webhook_id = manager.register("http://example.com/", types, SECRET, team)
    published = manager.send_event("goal", data)
    assert published.deliveries == int(matches)
    assert delivered_to(manager.db, published) == ({webhook_id} if matches else set())


def test_a_disabled_webhook_gets_nothing(manager: WebhookManager) -> None:
    webhook_id = manager.register("http://example.com/", ["goal"], SECRET)
    manager.update(webhook_id, {"enabled": False})
    assert manager.send_event("goal", {}).deliveries == 0


@pytest.mark.parametrize("number", range(len(recorded("deliveries.json"))))
def test_the_body_is_byte_for_byte_what_the_replaced_service_sent(
    manager: WebhookManager, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    delivery = recorded("deliveries.json")[number]
    data = json.loads(delivery["body"])
    event_type = data.pop("event_type")
    moment = datetime.fromisoformat(delivery["headers"]["X-Webhook-Timestamp"]).replace(tzinfo=UTC)
    monkeypatch.setattr(clock, "now", lambda: moment)
    assert payload(manager.db, manager.send_event(event_type, data).event_id) == delivery["body"]


def test_publishing_in_the_callers_transaction_is_both_or_neither(manager: WebhookManager, db: Database) -> None:
    manager.register("http://example.com/", ["order.paid"], SECRET)
    woken: list[list[lanes.Leased]] = []
    lanes.attach(db, outlet(Slots(10, 10), wake=lambda wake: woken.append(list(wake.leased))))
    with db.connection_context():
        db.execute_sql("CREATE TABLE orders (id integer)")
        with pytest.raises(ZeroDivisionError), db.atomic():
            db.execute_sql("INSERT INTO orders VALUES (1)")
            hookline.publish("order.paid", {"id": 1})
            raise ZeroDivisionError
        assert woken == []
        with db.atomic():
            db.execute_sql("INSERT INTO orders VALUES (2)")
            published = hookline.publish("order.paid", {"id": 2})
            assert woken == []  # not before the commit
    assert [event["event_id"] for event in history.page(db)] == [published.event_id]
    (delivery,) = deliveries.page(db)
    assert delivery["event_id"] == published.event_id
    assert [[delivery_id for delivery_id, _ in leased] for leased in woken] == [[delivery["delivery_id"]]]


def test_the_same_key_and_content_give_the_first_answer_again(db: Database, manager: WebhookManager) -> None:
    manager.register("http://example.com/", ["goal"], SECRET)
    first = hookline.publish("goal", {"n": 1}, "key")
    assert hookline.publish("goal", {"n": 1}, "key") == first._replace(duplicate=True)
    for event_type, data in (("goal", {"n": 2}), ("other", {"n": 1})):
        with pytest.raises(Conflict, match="other content"):
            hookline.publish(event_type, data, "key")
    assert len(history.page(db)) == 1
    assert len(deliveries.page(db)) == 1


def test_events_published_together_fail_or_succeed_each_alone(db: Database, manager: WebhookManager) -> None:
    manager.register("http://example.com/", ["goal"], SECRET)
    answers = events.publish_all(
        db,
        [
            NewEvent("goal", {"n": 1}, "a"),
            NewEvent("*", {}),
            NewEvent("goal", {"n": 1}, "a"),
            NewEvent("goal", {"n": 2}, "a"),
            NewEvent("goal", {"n": float("nan")}),
            NewEvent("goal", {}),
        ],
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [Published, Invalid, Published, Conflict, Invalid, Published]
    assert [answer.duplicate for answer in answers if isinstance(answer, Published)] == [False, True, False]
    assert len(deliveries.page(db)) == 2


@pytest.mark.parametrize(
    ("event_type", "data"),
    [("", {}), ("*", {}), ("a\nb", {}), ("ä", {}), ("a", []), ("a", {"x": {1, 2}}), ("a", {1: 2}), ("x" * 201, {})],
)
def test_what_cannot_be_an_event_is_refused(manager: WebhookManager, event_type: str, data: Any) -> None:
    with pytest.raises(Invalid):
        manager.send_event(event_type, data)
    assert history.page(manager.db) == []


def test_a_payload_over_the_limit_is_refused(db: Database, manager: WebhookManager) -> None:
    lanes.attach(db, outlet(max_payload=1000))
    frame = len('{"x":"","event_type":"a","timestamp":"2026-11-23T14:30:01.221962"}')
    with pytest.raises(TooLarge, match="MAX_PAYLOAD"):
        manager.send_event("a", {"x": "y" * 1000})
    assert manager.send_event("a", {"x": "y" * (1000 - frame)})


async def test_send_event_may_be_awaited_as_the_replaced_one_was(manager: WebhookManager) -> None:
    published = await manager.send_event("goal", {})
    assert published.event_type == "goal"


def test_deliveries_are_born_leased_as_far_as_there_are_slots(db: Database, manager: WebhookManager) -> None:
    woken: list[lanes.Leased] = []
    lanes.attach(db, outlet(Slots(free=3, per_webhook=2), wake=lambda wake: woken.extend(wake.leased)))
    ids = [manager.register(f"http://example.com/{n}", ["goal"], SECRET) for n in range(2)]
    events.publish_all(db, [NewEvent("goal", {})] * 3)
    assert len(woken) == 3
    assert sorted(lane_ids(db)) == sorted(ids)
    events.publish_all(db, [NewEvent("goal", {})])  # their lanes are due: nothing overtakes what waits
    assert len(woken) == 3


@pytest.mark.parametrize("change", [{"ordered": True}, {"rate_limit": 1.0}])
def test_order_and_rate_limits_go_through_the_lane(
    db: Database, manager: WebhookManager, change: dict[str, Any]
) -> None:
    woken: list[lanes.Leased] = []
    lanes.attach(db, outlet(Slots(10, 10), wake=lambda wake: woken.extend(wake.leased)))
    webhook_id = manager.register("http://example.com/", ["goal"], SECRET)
    manager.update(webhook_id, change)
    manager.send_event("goal", {})
    assert woken == []
    assert lane_ids(db) == [webhook_id]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_json_object_is_stored_as_ascii_that_means_the_same(manager: WebhookManager, data: dict[str, Any]) -> None:
    stored = payload(manager.db, manager.send_event("any", data).event_id)
    assert stored.isascii()
    assert {name: value for name, value in json.loads(stored).items() if name not in ("event_type", "timestamp")} == {
        name: value for name, value in data.items() if name not in ("event_type", "timestamp")
    }


def test_matching_seeks_and_never_scans(backend: str, db: Database, manager: WebhookManager) -> None:
    steps: list[str] = []

    def explain(event: Any) -> None:
        if event.sql.strip().startswith(("INSERT INTO deliveries", "WITH", "UPDATE deliveries")):
            steps.extend(plan(db, event.sql, event.params))

    manager.register("http://example.com/", ["goal"], SECRET)
    db.query_hooks.append(explain)
    manager.send_event("goal", {"team": "ne"})
    db.query_hooks.clear()
    seek = {
        "sqlite": "SEARCH s USING PRIMARY KEY (event_type=? AND team=?)",
        "postgres": "Index Cond: ((event_type = ",
    }[backend]
    assert any(seek in step for step in steps), steps
    assert not read_whole(steps, "deliveries") + read_whole(steps, "subscriptions", "s")


def test_publishing_without_a_database_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.db, "obj", None)
    with pytest.raises(Invalid, match=r"no database is bound: call hookline\.connect\(\.\.\.\) first"):
        hookline.publish("goal", {})
