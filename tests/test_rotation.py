"""Rotation: which secrets sign which header during overlaps, and that the old ones are erased when these end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from peewee import Database

from hookline import WebhookManager, clock, rotation, signing
from hookline.egress import Client
from hookline.errors import Conflict
from hookline.store.open import storage_of
from hookline.store.postgres import write_now
from hookline.worker import attempts
from hookline.worker.worker import Worker
from models import Webhook
from tests.databases import plan, read_whole
from tests.working import claim_up_to, rules, until

URL = "http://example.com/"
NOW = datetime.fromisoformat("2026-11-23T12:00:00Z")
FIRST, SECOND, THIRD = "the-first-secret-of-it", "the-second-secret-of-it", "the-third-secret-of-it"


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock to so many seconds after NOW."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr(clock, "now", lambda: NOW + timedelta(seconds=seconds))

    set_clock(0)
    return set_clock


@pytest.fixture
def webhook_id(manager: WebhookManager, after: Any) -> str:
    return manager.register(URL, ["goal"], FIRST)


def sent(db: Database, manager: WebhookManager) -> tuple[dict[str, str], bytes]:
    """The headers and the body of a delivery made now, as a worker signs it."""
    manager.send_event("goal", {})
    job = write_now(db, claim_up_to, 2)[-1]
    return attempts.signed_headers(job), job.body


def valid(headers: dict[str, str], body: bytes) -> set[str]:
    """The secrets whose holder accepts this delivery by its standard signature."""
    return {
        secret
        for secret in (FIRST, SECOND, THIRD)
        if signing.problem(headers, body, secret, clock.now().timestamp()) is None
    }


def of_legacy_header(headers: dict[str, str], body: bytes) -> str:
    wanted = headers["X-Webhook-Signature"]
    (secret,) = [secret for secret in (FIRST, SECOND, THIRD) if signing.legacy_signature(secret, body) == wanted]
    return secret


def stored(db: Database, webhook_id: str) -> str:
    """All that the database has of this webhook."""
    with db.connection_context():
        return str(Webhook.select().where(Webhook.webhook_id == webhook_id).dicts().get())


def sweep(db: Database) -> int:
    return write_now(db, rotation.erase, webhook_ids) if (webhook_ids := rotation.expired(db)) else 0


def test_a_receiver_of_the_legacy_header_has_the_whole_overlap_to_change_its_secret(
    db: Database, manager: WebhookManager, webhook_id: str, after: Any
) -> None:
    manager.rotate(webhook_id, SECOND, 60)
    headers, body = sent(db, manager)
    assert of_legacy_header(headers, body) == FIRST
    assert valid(headers, body) == {FIRST, SECOND}
    after(61)
    headers, body = sent(db, manager)
    assert of_legacy_header(headers, body) == SECOND
    assert valid(headers, body) == {SECOND}


def test_without_an_overlap_everything_is_signed_with_the_new_secret_at_once(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.rotate(webhook_id, SECOND, 60)
    assert manager.rotate(webhook_id, THIRD, 0) is None
    headers, body = sent(db, manager)
    assert of_legacy_header(headers, body) == THIRD
    assert valid(headers, body) == {THIRD}
    assert FIRST not in stored(db, webhook_id) and SECOND not in stored(db, webhook_id)


@pytest.mark.parametrize(("first", "second"), [(60, 600), (600, 60)])
def test_a_second_rotation_keeps_the_first_secret_valid_until_its_own_end(
    db: Database, manager: WebhookManager, webhook_id: str, after: Any, first: int, second: int
) -> None:
    manager.rotate(webhook_id, SECOND, first)
    expires = manager.rotate(webhook_id, THIRD, second)
    assert expires == NOW + timedelta(seconds=second)
    headers, body = sent(db, manager)
    assert headers["webhook-signature"].count("v1,") == 3
    assert valid(headers, body) == {FIRST, SECOND, THIRD}
    assert of_legacy_header(headers, body) == FIRST
    newest = signing.standard_signature(THIRD, headers["webhook-id"], int(headers["webhook-timestamp"]), body)
    assert headers["webhook-signature"].startswith(newest)
    after(61)
    headers, body = sent(db, manager)
    assert valid(headers, body) == {THIRD, SECOND if first == 60 else FIRST}
    assert of_legacy_header(headers, body) == (SECOND if first == 60 else FIRST)


@pytest.mark.parametrize(("first", "second"), [(60, 600), (600, 60)])
def test_an_old_secret_is_erased_from_the_database_when_its_overlap_ends(
    db: Database, manager: WebhookManager, webhook_id: str, after: Any, first: int, second: int
) -> None:
    manager.rotate(webhook_id, SECOND, first)
    manager.rotate(webhook_id, THIRD, second)
    assert sweep(db) == 0
    ends_first, stays = (FIRST, SECOND) if first == 60 else (SECOND, FIRST)
    after(61)
    assert sweep(db) == 1
    left = stored(db, webhook_id)
    assert ends_first not in left and stays in left
    assert valid(*sent(db, manager)) == {stays, THIRD}
    assert sweep(db) == 0
    after(601)
    assert sweep(db) == 1
    left = stored(db, webhook_id)
    assert FIRST not in left and SECOND not in left and THIRD in left
    assert sweep(db) == 0


async def test_a_worker_erases_what_has_ended(
    db: Database, manager: WebhookManager, webhook_id: str, after: Any
) -> None:
    manager.rotate(webhook_id, SECOND, 60)
    after(61)
    storage = storage_of(db)
    worker = Worker(storage, Client(), rules())
    await storage.start()
    await worker.start()
    await until(lambda: worker.sweeper.sweeps)
    await worker.stop()
    await storage.stop()
    left = stored(db, webhook_id)
    assert FIRST not in left and SECOND in left


def test_a_rotation_back_and_forth_signs_once_with_each_secret(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    manager.rotate(webhook_id, SECOND, 60)
    manager.rotate(webhook_id, FIRST, 60)
    assert manager.rotate(webhook_id, FIRST, 600) == NOW + timedelta(seconds=60)  # the second one's
    headers, body = sent(db, manager)
    assert headers["webhook-signature"].count("v1,") == 2
    assert valid(headers, body) == {FIRST, SECOND}


def test_rotations_without_end_are_refused_before_they_make_endless_headers(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    for number in range(rotation.MAX_KEPT):
        manager.rotate(webhook_id, f"{SECOND}-{number}", 60)
    with pytest.raises(Conflict, match="overlap"):
        manager.rotate(webhook_id, THIRD, 60)
    headers, _ = sent(db, manager)
    assert headers["webhook-signature"].count("v1,") == rotation.MAX_KEPT + 1
    assert manager.rotate(webhook_id, THIRD, 0) is None


def test_what_has_ended_is_found_whatever_the_number_of_webhooks(
    db: Database, manager: WebhookManager, webhook_id: str
) -> None:
    steps: list[str] = []
    db.query_hooks.append(lambda event: steps.extend(plan(db, event.sql, event.params)))
    with db.connection_context():
        rotation.expired(db)
    db.query_hooks.clear()
    for index in ("idx_webhooks_overlap", "idx_webhooks_earlier"):
        assert any(index in step for step in steps), steps
    assert not [step for step in read_whole(steps, "webhooks", "w") if "idx_webhooks_earlier" not in step], steps
