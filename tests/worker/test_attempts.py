"""One attempt: webhooks whose schedule or headers, as the database holds them, cannot be used."""

from __future__ import annotations

import pytest
from peewee import Database

from hookline import WebhookManager, policy
from models import Webhook
from tests.conftest import SECRET
from tests.receiver import Receiver
from tests.working import ended, rules, until, working

RULES = rules(retry_schedule=(0.05,), lease=30, timeout=10, concurrency=4)


@pytest.fixture(autouse=True)
def short_lane_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "LANE_BACKOFF", 0.01)


@pytest.mark.parametrize(
    "schedule", ["[1e12]", '["x"]', "[NaN]", "[-1]", "not JSON", '{"a": 1}', "null", "[" * 5000 + "]" * 5000]
)
async def test_a_retry_schedule_that_cannot_be_used_gives_way_to_the_default(
    db: Database, manager: WebhookManager, receiver: Receiver, schedule: str
) -> None:
    receiver.answers["/down"] = lambda _: (500, {}, b"")
    manager.register(f"{receiver.url}/down", ["goal"], SECRET)
    with db.connection_context():
        Webhook.update(retry_schedule=schedule).execute(db)
    async with working(db, RULES):
        manager.send_event("goal", {})
        (delivery,) = await until(ended(db))
    assert (delivery["status"], delivery["attempts"], delivery["reason"]) == ("failed", 2, "answered 500")
    assert len(receiver.received) == 2


@pytest.mark.parametrize("headers", ["not JSON", "[1]", '{"X-A": 1}', '{"X-A": "a\\nb"}'])
async def test_headers_that_cannot_be_sent_fail_the_delivery_in_words(
    db: Database, manager: WebhookManager, receiver: Receiver, headers: str
) -> None:
    manager.register(f"{receiver.url}/hook", ["goal"], SECRET)
    with db.connection_context():
        Webhook.update(headers=headers).execute(db)
    async with working(db, RULES):
        manager.send_event("goal", {})
        (delivery,) = await until(ended(db))
    assert (delivery["status"], delivery["attempts"]) == ("failed", 2)
    assert "headers" in delivery["reason"] or "header" in delivery["reason"] or "request failed" in delivery["reason"]
    assert receiver.received == []
