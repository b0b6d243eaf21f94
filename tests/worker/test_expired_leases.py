"""Leases that have expired: steps in short steps, from webhook to webhook."""

from __future__ import annotations

import pytest
from peewee import Database

from hookline import WebhookManager, lanes
from hookline.worker import claiming, expired_leases
from tests.conftest import SECRET
from tests.outlets import outlet


def test_only_lanes_whose_leases_have_expired_are_overdue(db: Database, manager: WebhookManager) -> None:
    manager.register("http://example.com/", ["goal"], SECRET)
    for lease in (-5.0, 60.0):
        lanes.attach(db, outlet(lanes.Slots(9, 9), lease=lease))
        with db.connection_context(), db.atomic():
            manager.send_event("goal" if lease < 0 else "none", {})
    late, after = expired_leases.overdue(db)
    assert (len(late), after) == (1, None)
    with db.connection_context(), db.atomic():
        assert lanes.make_due(db, late) == 1
        assert claiming.next_due(db, []) is not None
        assert lanes.make_due(db, late) == 0  # it is due already
        assert expired_leases.overdue(db) == ([], None)
        assert db.execute_sql("SELECT count(*) FROM lanes").fetchone()[0] == 1


def test_overdue_goes_from_webhook_to_webhook_in_short_steps(
    db: Database, manager: WebhookManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expired_leases, "WEBHOOKS", 2)
    ids = sorted(manager.register("http://example.com/", ["goal"], SECRET) for _ in range(5))
    lanes.attach(db, outlet(lanes.Slots(9, 9), lease=-5.0))
    manager.send_event("goal", {})
    steps: list[list[str]] = []
    after: str | None = ""
    while after is not None:
        late, after = expired_leases.overdue(db, after)
        steps.append(late)
    assert steps == [ids[:2], ids[2:4], ids[4:]]
