"""The recorder: a result that cannot be recorded."""

from __future__ import annotations

from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, deliveries, policy
from hookline.egress import Client
from hookline.policy import Result
from tests.conftest import SECRET
from tests.receiver import Receiver
from tests.working import rules, until, working

RULES = rules(retry_schedule=(0.05,), lease=30, timeout=10, concurrency=4)


@pytest.fixture(autouse=True)
def short_lane_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "LANE_BACKOFF", 0.01)


async def test_a_result_that_cannot_be_recorded_fails_its_attempt_alone(
    db: Database, manager: WebhookManager, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No database stores a lone surrogate. The client replaces them, should it ever fail to."""
    post = Client.post

    async def post_with_a_flaw(self: Client, url: str, body: bytes, headers: Any) -> Result:
        result = await post(self, url, body, headers)
        return result._replace(response="\ud800") if url.endswith("/flawed") else result

    monkeypatch.setattr(Client, "post", post_with_a_flaw)
    flawed = manager.register(f"{receiver.url}/flawed", ["goal"], SECRET)
    sound = manager.register(f"{receiver.url}/sound", ["goal"], SECRET)
    async with working(db, RULES) as worker:
        manager.send_event("goal", {})
        await until(lambda: not deliveries.page(db, status="pending"))
        await until(lambda: worker.capacity.free == RULES.concurrency)
    (failed,), (succeeded,) = deliveries.page(db, webhook_id=flawed), deliveries.page(db, webhook_id=sound)
    assert (failed["status"], failed["attempts"]) == ("failed", 2)
    assert failed["reason"] == "the result of the attempt could not be recorded"
    assert (succeeded["status"], len(receiver.at("/sound")), len(receiver.at("/flawed"))) == ("succeeded", 1, 2)
