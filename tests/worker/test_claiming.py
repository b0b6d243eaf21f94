"""Claims: their cost."""

from __future__ import annotations

from typing import Any

from peewee import Database

from hookline import WebhookManager, events
from hookline.events import NewEvent
from tests.conftest import SECRET
from tests.databases import plan, read_whole
from tests.working import claim_up_to


def test_a_claim_costs_the_same_whatever_the_backlog(db: Database, manager: WebhookManager) -> None:
    webhook_id = manager.register("http://example.com/", ["goal"], SECRET)
    steps: list[str] = []

    def explain(event: Any) -> None:
        if "deliveries" in event.sql:
            steps.extend(plan(db, event.sql, event.params))

    events.publish_all(db, [NewEvent("goal", {})] * 50)
    db.query_hooks.append(explain)
    with db.connection_context(), db.atomic():
        claimed = claim_up_to(db, 10)
    db.query_hooks.clear()
    assert [job.webhook_id for job in claimed] == [webhook_id] * 5  # half of what is free
    assert any("idx_deliveries_pending" in step for step in steps), steps
    assert not read_whole(steps, "deliveries", "d")
