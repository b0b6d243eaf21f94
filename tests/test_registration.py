"""One check of every field, for HTTP, Python and imports; webhooks over today's limits can be changed and moved."""

from __future__ import annotations

import base64
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peewee import Database
from starlette.testclient import TestClient

from hookline import WebhookManager, history, missed
from hookline.errors import Invalid, Unavailable
from hookline.registration import MAX_URL, generate_secret
from hookline.store.open import open_database
from hookline.transfer.json_file import export_file, import_file
from tests.conftest import SECRET, Server, registration

URL = "http://example.com/hook"
BAD_URLS = [
    "http://",
    "http:///x",
    "https:///x",
    "http://:80/",
    "http://user@/x",
    "http://exa mple.com/a b",
    "http://example.com/a b",
    "http://example.com/\t",
    "http://example.com/\u2028",
    "http://example.com/\x7f",
    "http://example.com/\0",
    "http://example.com/\ud800",
    "http://example.com:99999/",
    "http://example.com:x/",
    "http://[::1/",
    "http://[bad]/",
    "http://[::1]x/",
    "http://good.example\\@evil.example/",
    "ftp://example.com/",
    "example.com",
    "",
    None,
    5,
    ["http://example.com/"],
]
BAD_CHANGES: list[tuple[str, Any]] = [
    ("events", None),
    ("events", {"a": 1}),
    ("events", ["a", None]),
    ("events", "a"),
    ("team", 5),
    ("description", 5),
    ("description", "x" * 1001),
    ("headers", ["X-Mine"]),
    ("headers", {"X Mine": "1"}),
    ("headers", {5: "1"}),
    ("headers", {"Webhook-Id": "1"}),
    ("headers", {"X-Mine": "a\r\nb"}),
    ("headers", {"X-Mine": "ä"}),
    ("headers", {"X-Mine": 5}),
    ("headers", {f"X-{number}": "1" for number in range(21)}),
    ("enabled", None),
    ("enabled", 1),
    ("ordered", "yes"),
    ("retry_schedule", [1e12]),
    ("retry_schedule", ["x"]),
    ("retry_schedule", [float("nan")]),
    ("retry_schedule", [True]),
    ("retry_schedule", [0]),
    ("retry_schedule", []),
    ("retry_schedule", 5),
    ("retry_schedule", [1] * 51),
    ("rate_limit", "fast"),
    ("rate_limit", float("inf")),
    ("rate_limit", float("nan")),
    ("rate_limit", True),
    ("colour", "red"),
    ("webhook_id", "another"),
    ("secret", SECRET),
]


def rows(db: Database) -> list[Any]:
    columns = "webhook_id, url, events, secret, team, created_at, enabled, total_calls, failed_calls"
    with db.connection_context():
        stored = db.execute_sql(f"SELECT {columns} FROM webhooks ORDER BY webhook_id").fetchall()
        subscribed = db.execute_sql("SELECT event_type, team, webhook_id FROM subscriptions ORDER BY 1, 2, 3")
        return [*stored, *subscribed.fetchall()]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_is_refused_on_all_three_ways_in(manager: WebhookManager, tmp_path: Path, url: Any) -> None:
    with pytest.raises(Invalid, match=r"^url "):
        manager.register(url, ["a"], SECRET)
    webhook_id = manager.register(URL, ["a"], SECRET)
    with pytest.raises(Invalid, match=r"^url "):
        manager.update(webhook_id, {"url": url})
    file = tmp_path / "webhooks.json"
    file.write_text(json.dumps({"x": {"url": url, "events": ["a"], "secret": SECRET}}))
    with pytest.raises(Invalid) as caught:
        import_file(manager.db, file)
    assert caught.value.problems[0].startswith("x: url: ")
    assert manager.get(webhook_id)["url"] == URL


@pytest.mark.parametrize(
    "url",
    [
        "HTTP://EXAMPLE.COM",
        "http://bücher.example/ä?b=c#d",
        "http://[::1]:8123/x",
        "http://a_b.local:0/%20",
        "http://x?y",
    ],
)
def test_a_url_from_python_is_stored_as_it_was_given(manager: WebhookManager, url: str) -> None:
    assert manager.get(manager.register(url, ["a"], SECRET))["url"] == url


def test_a_password_in_a_url_is_kept_by_an_import_alone(manager: WebhookManager, tmp_path: Path) -> None:
    file, secret_url = tmp_path / "webhooks.json", "http://user:hush@example.com/"
    with pytest.raises(Invalid, match="user name or password") as caught:
        manager.register(secret_url, ["a"], SECRET)
    assert "hush" not in str(caught.value)
    with pytest.raises(Invalid, match="must not be longer"):
        manager.register("http://example.com/" + "x" * MAX_URL, ["a"], SECRET)
    file.write_text(json.dumps({"x": {"url": secret_url, "events": ["a"], "secret": SECRET}}))
    assert import_file(manager.db, file).new == 1
    assert manager.update("x", {"enabled": False})["url"] == secret_url


@pytest.mark.parametrize(("name", "value"), BAD_CHANGES)
def test_a_change_from_python_is_checked_as_one_over_http(manager: WebhookManager, name: str, value: Any) -> None:
    webhook_id = manager.register(URL, ["a"], SECRET, headers={"X-Mine": "1"})
    before = manager.get(webhook_id)
    with pytest.raises(Invalid, match=f"^{name} "):
        manager.update(webhook_id, {name: value})
    assert manager.get(webhook_id) == before


@pytest.mark.parametrize("headers", [value for name, value in BAD_CHANGES if name == "headers"])
def test_headers_of_a_registration_from_python_are_checked(manager: WebhookManager, headers: Any) -> None:
    with pytest.raises(Invalid, match=r"^headers "):
        manager.register(URL, ["a"], SECRET, headers=headers)


def test_good_changes_of_every_field_are_taken(manager: WebhookManager) -> None:
    webhook_id = manager.register(URL, ("a",), SECRET)
    changes: dict[str, Any] = {
        "url": "https://example.com/other",
        "events": ("b", "*"),
        "team": None,
        "description": None,
        "headers": {"X-Mine": "1"},
        "enabled": False,
        "retry_schedule": (0.1, 5, 30 * 86400),
        "rate_limit": 5,
        "ordered": True,
    }
    shown = manager.update(webhook_id, changes)
    expected = {"events": ["b", "*"], "headers": {"X-Mine": "***"}, "retry_schedule": [0.1, 5, 30 * 86400]}
    assert {name: shown[name] for name in changes} == changes | expected


@pytest.mark.parametrize("overlap", [-1, float("nan"), float("inf"), 31 * 86400, "60", None])
def test_an_overlap_that_makes_no_sense_is_refused(manager: WebhookManager, overlap: Any) -> None:
    webhook_id = manager.register(URL, ["a"], SECRET)
    with pytest.raises(Invalid, match=r"^overlap_seconds "):
        manager.rotate(webhook_id, SECRET, overlap)


def test_a_short_secret_from_python_is_taken_with_a_warning_and_over_http_refused(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    db = open_database(server.place.url)
    manager = WebhookManager(db=db)
    with caplog.at_level(logging.WARNING, "hookline"):
        webhook_id = manager.register(URL, ["a"], "test-secret")
        manager.rotate(webhook_id, "another", 0)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [f"webhook {webhook_id}"] * 2
    assert "test-secret" not in caplog.text
    with pytest.raises(Invalid, match=r"^secret "):
        manager.register(URL, ["a"], "")
    with pytest.raises(Invalid, match=r"^secret "):
        manager.register(URL, ["a"], "whsec_")
    db.close_all()  # type: ignore[attr-defined]
    for path in ("", "/register", f"/{webhook_id}/rotate-secret"):
        body = {"secret": "test-secret"} if "rotate" in path else registration(secret="test-secret")
        answer = server.client.post(f"/api/v1/webhooks{path}", json=body)
        assert answer.status_code == 422
        assert "test-secret" not in answer.text


@pytest.mark.parametrize(
    ("secret", "fits"),
    [
        ("whsec_" + "A" * 28, False),  # 21 bytes
        ("whsec_" + "A" * 32, True),  # 24
        ("whsec_" + base64.b64encode(bytes(range(32))).decode(), True),
        ("whsec_" + "A" * 85 + "A", True),  # 64
        ("whsec_" + "A" * 88, False),  # 66
        ("whsec_" + "not base64 at all, not", False),
        ("an-ordinary-secret", True),
    ],
)
def test_on_new_routes_a_whsec_secret_has_a_key_of_24_to_64_bytes(client: TestClient, secret: str, fits: bool) -> None:
    created = client.post("/api/v1/webhooks", json=registration(secret=secret))
    assert created.status_code == (201 if fits else 422)
    webhook_id = client.post("/api/v1/webhooks/register", json=registration()).json()["webhook_id"]
    rotated = client.post(f"/api/v1/webhooks/{webhook_id}/rotate-secret", json={"secret": secret})
    assert rotated.status_code == (200 if fits else 422)
    assert secret not in created.text + rotated.text


def test_what_was_imported_over_todays_limits_can_be_changed_and_disabled(server: Server) -> None:
    db = open_database(server.place.url)
    file = server.place.folder / "webhooks.json"
    entry = {"url": "http://user:p@example.com/", "events": [f"e{n}" for n in range(1500)], "secret": "s"}
    few = {**entry, "events": ["a"]}
    file.write_text(json.dumps({"many": entry, "team": few, "odd": {**few, "url": "http://\u2100/"}}))
    assert import_file(db, file).new == 3
    with db.connection_context():  # as migration 0001 adopts it
        db.execute_sql(f"UPDATE webhooks SET team = '{'t' * 300}' WHERE webhook_id = 'team'")
    for webhook_id in ("many", "team", "odd"):
        path = f"/api/v1/webhooks/{webhook_id}"
        for changes in ({"description": "mine"}, {"enabled": False}, {"enabled": True}, {"url": "http://example.com/"}):
            answer = server.client.patch(path, json=changes)
            assert answer.status_code == 200, answer.text
    assert len(server.client.get("/api/v1/webhooks/many").json()["events"]) == 1500
    assert server.client.patch("/api/v1/webhooks/team", json={"events": ["b"]}).status_code == 200
    assert server.client.get("/api/v1/webhooks/team").json()["team"] == "t" * 300
    assert server.client.patch("/api/v1/webhooks/many", json={"events": entry["events"]}).status_code == 422
    db.close_all()  # type: ignore[attr-defined]


def test_a_created_webhook_is_answered_though_nothing_can_be_read(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*arguments: Any) -> Any:
        raise Unavailable("the database went away")

    storage = client.app.state.services.storage  # type: ignore[attr-defined]
    monkeypatch.setattr(storage, "read", failing)
    monkeypatch.setattr(storage, "scan", failing)
    answer = client.post("/api/v1/webhooks", json={"url": URL, "events": ["a"], "headers": {"X-Mine": "1"}})
    monkeypatch.undo()
    created = answer.json()
    assert answer.status_code == 201
    assert created.pop("secret").startswith("whsec_")
    assert created.pop("warnings") == []
    assert client.get(answer.headers["location"]).json() == created


def test_a_test_event_takes_a_type_and_data_and_no_unknown_fields(server: Server) -> None:
    webhook_id = server.register().json()["webhook_id"]
    path = f"/api/v1/webhooks/{webhook_id}/test"
    for body, event_type, data in [
        (None, "hookline.webhook.test", None),
        ({}, "hookline.webhook.test", None),
        ({"event_type": "goal"}, "goal", None),
        ({"data": {"n": 1}}, "hookline.webhook.test", {"n": 1}),
        ({"event_type": "goal", "data": {}}, "goal", {}),
    ]:
        answer = server.client.post(path) if body is None else server.client.post(path, json=body)
        published = answer.json()
        assert (answer.status_code, published["event_type"], published["deliveries"]) == (202, event_type, 1)
        shown = server.client.get(f"/api/v1/events/{published['event_id']}").json()["data"]
        assert {name: shown[name] for name in shown if name not in ("event_type", "timestamp")} == (
            {"message": "A test event: it was asked for by hand, and means nothing."} if data is None else data
        )
    wrongs: list[Any] = [{"colour": "red"}, {"event_type": ""}, {"event_type": "*"}, {"data": []}, [], "x"]
    for wrong in wrongs:
        assert server.client.post(path, json=wrong).status_code == 422
    assert server.client.post("/api/v1/webhooks/another/test", json={}).status_code == 404


def test_a_test_event_of_an_ordinary_type_is_missed_by_nobody_else(manager: WebhookManager) -> None:
    first, second = (manager.register(URL, ["goal"], SECRET) for _ in range(2))
    began = manager.get(first)["created_at"]
    published = manager.send_test(first, "goal", {"n": 1})
    assert published.deliveries == 1
    assert missed.count(manager.db, second, began, status="all")["deliveries"] == 0
    assert [row["reason"] for row in history.explain(manager.db, published.event_id)] == [
        "matched",
        "a test of another webhook",
    ]


text = st.text(max_size=12)
urls = st.one_of(
    text,
    text.map(lambda rest: f"http://{rest}"),
    text.map(lambda rest: f"https://example.com/{rest}"),
    st.sampled_from([url for url in BAD_URLS if isinstance(url, str)]),
    st.from_regex(r"https?://([a-z]*@)?[a-zA-Z0-9.\[\]:%_-]{0,20}(:\d{0,6})?[/?#]?[!-~]*", fullmatch=True),
)
registrations = st.fixed_dictionaries(
    {
        "url": urls,
        "events": st.lists(text, max_size=4),
        "secret": text | st.sampled_from([SECRET, generate_secret(), "whsec_A"]),
        "team": st.none() | text,
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(registrations, max_size=6))
def test_whatever_was_registered_is_exported_and_imported_as_it_was(
    db: Database, tmp_path: Path, registered: list[dict[str, Any]]
) -> None:
    manager, file = WebhookManager(db=db), tmp_path / "webhooks.json"
    with db.connection_context():
        db.execute_sql("DELETE FROM webhooks")
        db.execute_sql("DELETE FROM imports")
    manager.register(URL, ["a"], SECRET)
    for fields in registered:
        with suppress(Invalid):
            manager.register(**fields)
    before = rows(db)
    export_file(db, file)
    with db.connection_context():
        db.execute_sql("DELETE FROM webhooks")
        db.execute_sql("DELETE FROM imports")
    report = import_file(db, file)
    assert (report.problems, rows(db)) == ([], before)


def test_what_was_registered_over_http_is_exported_and_imported_as_it_was(client: TestClient, tmp_path: Path) -> None:
    @settings(max_examples=300, deadline=None)
    @given(registrations)
    def register(fields: dict[str, Any]) -> None:
        content = json.dumps(fields | {"secret": SECRET})
        answer = client.post("/api/v1/webhooks/register", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (201, 422)

    register()
    db, file = client.app.state.services.storage.db, tmp_path / "webhooks.json"  # type: ignore[attr-defined]
    before = rows(db)
    assert before
    export_file(db, file)
    with db.connection_context():
        db.execute_sql("DELETE FROM webhooks")
        db.execute_sql("DELETE FROM imports")
    assert import_file(db, file).problems == []
    assert rows(db) == before
