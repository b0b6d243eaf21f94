"""Events and deliveries over HTTP, against the real server and a real receiver."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Server, registration
from tests.receiver import Receiver

Serve = Callable[..., Server]
LOOPBACK = "127.0.0.0/8"


@pytest.fixture
def delivering(serve: Serve) -> Server:
    return serve(ALLOWED_NETWORKS=LOOPBACK, RETRY_SCHEDULE="200ms", DELIVERY_TIMEOUT="2s")


def create(server: Server, url: str, **changes: Any) -> str:
    body = registration(url=url, team=None) | changes
    answer = server.client.post("/api/v1/webhooks", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["webhook_id"])


def publish(server: Server, event_type: str = "game_started", **body: Any) -> Any:
    return server.client.post("/api/v1/events", json={"event_type": event_type, "data": {"n": 1}, **body})


def ended(server: Server, **filters: str) -> list[dict[str, Any]]:
    """Wait until none of these deliveries is pending."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        found = server.client.get("/api/v1/deliveries", params=filters).json()["data"]
        if found and all(one["status"] != "pending" for one in found):
            return list(found)
        time.sleep(0.02)
    raise AssertionError("deliveries are still pending")


def test_an_event_is_accepted_delivered_and_logged(delivering: Server, receiver: Receiver) -> None:
    webhook_id = create(delivering, f"{receiver.url}/hook")
    accepted = publish(delivering)
    assert accepted.status_code == 202
    event = accepted.json()
    assert event == {
        "event_id": event["event_id"],
        "event_type": "game_started",
        "deliveries": 1,
        "duplicate": False,
    }
    receiver.wait_for(1)
    (delivery,) = ended(delivering, event_id=event["event_id"])
    assert (delivery["webhook_id"], delivery["status"], delivery["attempts"]) == (webhook_id, "succeeded", 1)
    one = delivering.client.get(f"/api/v1/deliveries/{delivery['delivery_id']}").json()
    assert [(attempt["number"], attempt["status_code"]) for attempt in one["attempt_log"]] == [(1, 200)]
    shown = delivering.client.get(f"/api/v1/events/{event['event_id']}").json()
    assert shown["deliveries"]["succeeded"] == 1
    explained = delivering.client.get(f"/api/v1/events/{event['event_id']}/explain").json()
    assert [(why["webhook_id"], why["reason"]) for why in explained["data"]] == [(webhook_id, "matched")]
    legacy = delivering.client.get("/api/v1/webhooks/list").json()["webhooks"]
    assert (legacy[0]["total_calls"], legacy[0]["failed_calls"]) == (1, 0)


def test_an_idempotency_key_may_come_in_the_header_or_the_body(delivering: Server) -> None:
    first = delivering.client.post(
        "/api/v1/events", json={"event_type": "a", "data": {}}, headers={"Idempotency-Key": "k"}
    )
    again = publish(delivering, "a", data={}, idempotency_key="k")
    other = publish(delivering, "a", data={"n": 2}, idempotency_key="k")
    assert again.json() == {**first.json(), "duplicate": True}
    assert (other.status_code, list(other.json())) == (409, ["detail"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"event_type": "", "data": {}}, 422),
        ({"event_type": "*", "data": {}}, 422),
        ({"event_type": "a"}, 422),
        ({"event_type": "a", "data": []}, 422),
        ({"event_type": "a", "data": {}, "more": 1}, 422),
        ({"event_type": "a", "data": {"x": "y" * 300_000}}, 413),
    ],
)
def test_what_cannot_be_an_event_is_refused_and_stores_nothing(server: Server, body: Any, status: int) -> None:
    assert server.client.post("/api/v1/events", json=body).status_code == status
    assert server.client.get("/api/v1/events").json() == {"data": [], "next_cursor": None}


def test_a_refused_address_is_a_failed_attempt_that_names_the_setting(serve: Serve, receiver: Receiver) -> None:
    server = serve(RETRY_SCHEDULE="100ms")
    created = server.client.post("/api/v1/webhooks", json=registration(url=receiver.url, team=None)).json()
    assert "ALLOWED_NETWORKS" in created["warnings"][0]
    publish(server)
    (delivery,) = ended(server)
    assert delivery["status"] == "failed"
    assert "127.0.0.1 is not a public address" in delivery["reason"] and "ALLOWED_NETWORKS" in delivery["reason"]
    assert receiver.received == []


def test_a_delivery_is_retried_and_cancelled_by_hand(delivering: Server, receiver: Receiver) -> None:
    receiver.answers["/down"] = lambda _: (500, {}, b"broken")
    create(delivering, f"{receiver.url}/down")
    publish(delivering)
    (failed,) = ended(delivering)
    path = f"/api/v1/deliveries/{failed['delivery_id']}"
    assert (failed["status"], failed["attempts"]) == ("failed", 2)
    del receiver.answers["/down"]
    assert delivering.client.post(f"{path}/retry").json()["status"] == "pending"
    (again,) = ended(delivering)
    assert (again["status"], again["attempts"]) == ("succeeded", 3)
    refused = delivering.client.post(f"{path}/cancel")
    assert (refused.status_code, refused.json()) == (409, {"detail": "this delivery has succeeded already"})


def test_a_webhook_is_tested_replayed_and_its_rules_set(delivering: Server, receiver: Receiver) -> None:
    webhook_id = create(delivering, f"{receiver.url}/hook")
    path = f"/api/v1/webhooks/{webhook_id}"
    assert delivering.client.post(f"{path}/test").json()["deliveries"] == 1
    assert receiver.wait_for(1)[0].data["event_type"] == "hookline.webhook.test"
    rules = {"retry_schedule": [1, 60.5], "rate_limit": 50, "ordered": True}
    changed = delivering.client.patch(path, json=rules).json()
    assert {name: changed[name] for name in rules} == {**rules, "retry_schedule": [1.0, 60.5]}
    publish(delivering)
    receiver.wait_for(2)
    ended(delivering)
    wanted = {"since": "2020-01-01T00:00:00Z", "status": "all"}
    counted = delivering.client.post(f"{path}/replay", json={**wanted, "dry_run": True})
    assert (counted.status_code, counted.json()["deliveries"]) == (200, 2)
    begun = delivering.client.post(f"{path}/replay", json=wanted)
    assert (begun.status_code, begun.json()["state"]) == (202, "running")
    receiver.wait_for(4)
    wrong = [{"retry_schedule": []}, {"retry_schedule": [0]}, {"rate_limit": 0}, {"ordered": None}]
    assert [delivering.client.patch(path, json=one).status_code for one in wrong] == [422] * 4
    assert delivering.client.post(f"{path}/replay", json={"since": "2020-01-01T00:00:00"}).status_code == 422


def test_events_and_deliveries_are_paged(delivering: Server, receiver: Receiver) -> None:
    create(delivering, f"{receiver.url}/hook")
    for n in range(5):
        publish(delivering, data={"n": n})
    for path, key in (("/api/v1/events", "event_id"), ("/api/v1/deliveries", "delivery_id")):
        seen: list[Any] = []
        cursor = ""
        while cursor is not None:
            page = delivering.client.get(path, params={"limit": 2, "cursor": cursor}).json()
            seen += [one[key] for one in page["data"]]
            cursor = page["next_cursor"]
        assert len(seen) == 5
        assert seen == sorted(seen, reverse=True)
        assert delivering.client.get(path, params={"cursor": "nonsense"}).status_code == 422


@pytest.mark.parametrize("path", ["1", "0", "x", "9" * 30, "-1"])
def test_a_delivery_that_is_not_there_is_404(server: Server, path: str) -> None:
    for method, more in (("GET", ""), ("POST", "/retry"), ("POST", "/cancel")):
        answer = server.client.request(method, f"/api/v1/deliveries/{path}{more}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Delivery not found"})


def test_what_was_accepted_before_a_restart_is_delivered_after_it(serve: Serve, receiver: Receiver) -> None:
    first = serve(RUN_WORKER="false", ALLOWED_NETWORKS=LOOPBACK)
    create(first, f"{receiver.url}/hook")
    event_id = publish(first).json()["event_id"]
    first.stop()
    assert receiver.received == []
    serve(ALLOWED_NETWORKS=LOOPBACK)
    assert receiver.wait_for(1)[0].event_id == event_id


def cursor(*values: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode()


def test_what_no_database_can_store_is_answered_alike_by_both(server: Server) -> None:
    webhook_id = create(server, "http://example.com/")
    client, nul, surrogate = server.client, "a\0b", "\ud800"
    for path in ("webhooks/a%00b", "events/a%00b", "events/a%00b/explain", "deliveries/a%00b"):
        assert client.get(f"/api/v1/{path}").status_code == 404
    for change in (client.delete, client.patch):
        assert change("/api/v1/webhooks/a%00b").status_code in (404, 405)
    for text in (nul, surrogate):
        published = client.post(
            "/api/v1/events",
            content=json.dumps({"event_type": "a", "data": {"team": text}}),
            headers={"Content-Type": "application/json"},
        )
        assert (published.status_code, published.json().get("deliveries")) == ((202, 0) if text == nul else (422, None))
        for path in ("webhooks", "events"):
            place = cursor("2026-01-01T00:00:00", text)
            assert client.get(f"/api/v1/{path}", params={"cursor": place}).status_code == 422
    assert client.get("/api/v1/deliveries", params={"cursor": cursor(2**63)}).status_code == 422
    for since in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        answer = client.post(f"/api/v1/webhooks/{webhook_id}/replay", json={"since": since})
        assert (answer.status_code, "years 1 to 9999" in answer.text) == (422, True)
    assert client.patch(f"/api/v1/webhooks/{webhook_id}", json={"rate_limit": 1e-50}).status_code == 422
