"""Registrations, as the story names them, through `WebhookManager`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peewee import Database, IntegrityError

from hookline import WebhookManager
from hookline.errors import Invalid, NotFound
from models import Subscription, Webhook
from tests.conftest import ROOT, SECRET, recorded

URL = "http://homeassistant.local:8123/api/webhook/ne_game"


def subscriptions(db: Database) -> set[tuple[str, str, str]]:
    with db.connection_context():
        return set(db.execute_sql("SELECT event_type, team, webhook_id FROM subscriptions").fetchall())


def test_model_creation(db: Database) -> None:
    now = datetime.now(UTC)
    with db.connection_context():
        Webhook.create(webhook_id="a", url=URL, events="[]", secret=SECRET, created_at=now)
        stored = Webhook.get_by_id("a")
    assert (stored.created_at, stored.enabled, stored.total_calls, stored.team) == (now, True, 0, None)


def test_a_webhook_id_is_unique(db: Database, manager: WebhookManager) -> None:
    ids = {manager.register(URL, ["a"], SECRET) for _ in range(100)}
    assert len(ids) == 100
    with db.connection_context(), pytest.raises(IntegrityError, match=r"(?i)unique"):
        Webhook.create(webhook_id=ids.pop(), url=URL, events="[]", secret=SECRET, created_at=datetime.now(UTC))


def test_query_by_team(manager: WebhookManager) -> None:
    ids = {team: manager.register(URL, ["a"], SECRET, team=team) for team in ("ne", "sf", None)}
    assert [webhook["webhook_id"] for webhook in manager.list(team="ne")] == [ids["ne"]]


def test_register_and_unregister(db: Database, manager: WebhookManager) -> None:
    webhook_id = manager.register(URL, ["game_started", "game_ended", "game_started"], SECRET, team="ne")
    assert subscriptions(db) == {("game_started", "ne", webhook_id), ("game_ended", "ne", webhook_id)}
    assert manager.get(webhook_id)["events"] == ["game_started", "game_ended", "game_started"]
    assert manager.unregister(webhook_id) is True
    assert manager.unregister(webhook_id) is False
    assert subscriptions(db) == set()
    with pytest.raises(NotFound):
        manager.get(webhook_id)


def test_get_all_masks_secrets_and_keeps_the_old_form(manager: WebhookManager) -> None:
    webhook_id = manager.register(URL, ["a"], SECRET)
    (shown,) = manager.get_all()
    assert (shown["id"], shown["secret"]) == (webhook_id, "***")
    assert list(shown) == [*next(iter(recorded("webhooks.json").values())), "id"]
    assert datetime.fromisoformat(shown["created_at"]).tzinfo is None


def test_a_rolled_back_transaction_takes_the_registration_with_it(db: Database, manager: WebhookManager) -> None:
    kept = manager.register(URL, ["a"], SECRET)
    with db.connection_context():
        with pytest.raises(ValueError, match="the caller"), db.atomic():
            manager.register(URL, ["a"], SECRET)
            manager.unregister(kept)
            raise ValueError("the caller")
        assert Webhook.select().count() == Subscription.select().count() == 1
    assert kept in manager.webhooks


async def test_it_is_a_drop_in_for_the_replaced_manager(tmp_path: Path) -> None:
    manager = WebhookManager(db_path=str(tmp_path / "new" / "webhooks.db"))
    await manager.startup()
    webhook_id = manager.register(URL, ["a"], SECRET, team="ne")
    assert webhook_id in manager.webhooks
    assert "another" not in manager.webhooks
    assert len(manager.webhooks) == 1
    assert list(manager.webhooks) == [webhook_id]
    assert manager.webhooks[webhook_id]["url"] == URL
    assert manager.webhooks[webhook_id]["secret"] == "***"
    with pytest.raises(KeyError):
        manager.webhooks["another"]
    with pytest.raises(TypeError):
        manager.webhooks["another"] = {}  # type: ignore[index]
    await manager.shutdown()
    assert len(WebhookManager(tmp_path / "new" / "webhooks.db").webhooks) == 1


def test_two_processes_agree(tmp_path: Path) -> None:
    manager = WebhookManager(tmp_path / "webhooks.db")
    script = "import sys; from hookline import WebhookManager as M; "
    script += "print(M(sys.argv[1]).register(sys.argv[2], ['a'], sys.argv[3]))"
    command = [sys.executable, "-c", script, str(tmp_path / "webhooks.db"), URL, SECRET]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in manager.webhooks
    assert manager.unregister(done.stdout.strip())


def test_an_update_changes_what_is_given(db: Database, manager: WebhookManager) -> None:
    webhook_id = manager.register(URL, ["a"], SECRET, team="ne", headers={"X-Mine": "1"})
    shown = manager.update(webhook_id, {"events": ["b", "*"], "team": None})
    assert (shown["events"], shown["team"], shown["url"]) == (["b", "*"], None, URL)
    assert subscriptions(db) == {("b", "", webhook_id), ("*", "", webhook_id)}
    with db.connection_context():
        assert json.loads(str(Webhook.get_by_id(webhook_id).headers)) == {"X-Mine": "1"}
    with pytest.raises(NotFound):
        manager.update("another", {"enabled": False})


def test_enabling_again_clears_the_failure(db: Database, manager: WebhookManager) -> None:
    webhook_id = manager.register(URL, ["a"], SECRET)
    with db.connection_context():
        Webhook.update(enabled=False, disabled_reason="gone", failing_since=datetime.now(UTC)).execute()
    assert manager.get(webhook_id)["disabled_reason"] == "gone"
    assert manager.update(webhook_id, {"enabled": True})["disabled_reason"] is None
    with db.connection_context():
        assert Webhook.get_by_id(webhook_id).failing_since is None


def test_a_rotation_keeps_the_previous_secret_for_the_overlap(db: Database, manager: WebhookManager) -> None:
    webhook_id = manager.register(URL, ["a"], SECRET)
    expires = manager.rotate(webhook_id, "the-second-secret", 60)
    with db.connection_context():
        stored = Webhook.get_by_id(webhook_id)
    assert (stored.secret, stored.previous_secret) == ("the-second-secret", SECRET)
    assert stored.previous_secret_expires_at == expires
    assert manager.rotate(webhook_id, "the-third-secret-", 0) is None
    with db.connection_context():
        assert Webhook.get_by_id(webhook_id).previous_secret is None
    with pytest.raises(NotFound):
        manager.rotate("another", SECRET, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "ftp://example.com"},
        {"url": "http://example.com/\0"},
        {"events": "game_started"},
        {"events": [3]},
        {"events": ["a"] * 1001},
        {"events": ["\ud800"]},
        {"events": ["a" * 201]},
        {"team": "\0"},
        {"team": "a" * 201},
        {"secret": "s" * 1025},
        {"secret": "whsec_not base64 at all"},
    ],
)
def test_what_is_wrong_is_refused_without_echoing_a_secret(manager: WebhookManager, wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"url": URL, "events": ["a"], "secret": SECRET} | wrong
    with pytest.raises(Invalid) as caught:
        manager.register(**given)
    assert str(caught.value).startswith(next(iter(wrong)))
    assert given["secret"] not in str(caught.value)
    assert len(manager.webhooks) == 0


events = st.lists(st.sampled_from(["a", "b", "c", "*"]), max_size=4)
teams = st.sampled_from([None, "ne", "sf"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(events, teams), max_size=12), st.integers(1, 5), st.sampled_from([None, "a", "b"]), teams)
def test_paging_gives_each_webhook_once_in_order(
    registered: list[tuple[list[str], str | None]], limit: int, event: str | None, team: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manager = WebhookManager(Path(folder) / "webhooks.db")
        ids = [(manager.register(URL, wanted, SECRET, of), wanted, of) for wanted, of in registered]
        expected = [
            webhook_id
            for webhook_id, wanted, of in ids
            if (team is None or of == team) and (event is None or event in wanted or "*" in wanted)
        ]
        found: list[str] = []
        after = None
        while page := manager.list(team=team, event=event, limit=limit, after=after):
            assert len(page) <= limit
            found += [webhook["webhook_id"] for webhook in page]
            after = (page[-1]["created_at"], page[-1]["webhook_id"])
        assert found == expected
        manager.db.close_all()  # type: ignore[attr-defined]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["register", "update", "unregister"]), events, teams), max_size=15))
def test_subscriptions_always_follow_from_the_webhooks(steps: list[tuple[str, list[str], str | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manager = WebhookManager(Path(folder) / "webhooks.db")
        for step, wanted, team in steps:
            ids = list(manager.webhooks)
            if step == "register" or not ids:
                manager.register(URL, wanted, SECRET, team)
            elif step == "update":
                manager.update(ids[0], {"events": wanted, "team": team})
            else:
                manager.unregister(ids[0])
        implied = {
            (event, webhook["team"] or "", webhook["webhook_id"])
            for webhook in manager.list(limit=200)
            for event in webhook["events"]
        }
        assert subscriptions(manager.db) == implied
        manager.db.close_all()  # type: ignore[attr-defined]
