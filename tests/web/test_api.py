"""The new routes, and what no route may do, against the real server."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.conftest import SECRET, Server, manage, recorded, registration


def create(server: Server, **changes: Any) -> dict[str, Any]:
    body = registration(**changes)
    answer = server.client.post("/api/v1/webhooks", json={k: v for k, v in body.items() if v is not ...})
    assert answer.status_code == 201, answer.text
    created = dict(answer.json())
    assert answer.headers["location"] == f"/api/v1/webhooks/{created['webhook_id']}"
    assert created.pop("warnings") == []
    return created


def test_a_webhook_can_be_created_read_changed_and_deleted(server: Server) -> None:
    webhook = create(server, description="the lights", headers={"Authorization": "Bearer of-the-receiver"})
    path = f"/api/v1/webhooks/{webhook['webhook_id']}"
    assert server.client.get(path).json() == webhook
    assert webhook["headers"] == {"Authorization": "***"}
    assert "secret" not in webhook

    changed = server.client.patch(path, json={"events": ["*"], "team": None, "enabled": False}).json()
    assert (changed["events"], changed["team"], changed["enabled"]) == (["*"], None, False)
    assert changed["url"] == webhook["url"]
    assert changed["headers"] == {"Authorization": "***"}
    assert changed["updated_at"] > webhook["updated_at"]

    assert server.client.delete(path).status_code == 204
    for method in ("GET", "PATCH", "DELETE"):
        answer = server.client.request(method, path, json={})
        assert (answer.status_code, answer.json()) == (404, {"detail": "Webhook not found"})


def test_a_generated_secret_is_shown_once(server: Server) -> None:
    webhook = create(server, secret=...)
    assert webhook["secret"].startswith("whsec_")
    assert "secret" not in server.client.get(f"/api/v1/webhooks/{webhook['webhook_id']}").json()
    assert "secret" not in create(server, secret=webhook["secret"])


def test_a_secret_is_rotated_with_an_overlap(server: Server) -> None:
    path = f"/api/v1/webhooks/{create(server)['webhook_id']}/rotate-secret"
    generated = server.client.post(path).json()
    assert generated["secret"].startswith("whsec_")
    assert generated["previous_secret_expires_at"].endswith("Z")
    given = server.client.post(path, json={"secret": "another-secret-of-mine", "overlap_seconds": 0}).json()
    assert "secret" not in given
    assert given["previous_secret_expires_at"] is None
    assert server.client.post(path.replace("webhooks/", "webhooks/x"), json={}).status_code == 404
    assert server.client.post(path, json={"overlap_seconds": -1}).status_code == 422


def test_pages_follow_each_other_and_filters_narrow_them(server: Server) -> None:
    kinds = [(team, event) for team in ("ne", "sf") for event in ("a", "b", "*")]
    ids = [create(server, team=team, events=[event])["webhook_id"] for team, event in kinds]
    found, cursor = [], ""
    while True:
        page = server.client.get("/api/v1/webhooks", params={"limit": 2, "cursor": cursor}).json()
        found += [webhook["webhook_id"] for webhook in page["data"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert found == ids

    def filtered(**query: str) -> list[str]:
        return [one["webhook_id"] for one in server.client.get("/api/v1/webhooks", params=query).json()["data"]]

    assert filtered(team="sf") == ids[3:]
    assert filtered(event="a") == [ids[0], ids[2], ids[3], ids[5]]
    assert filtered(event="b", team="ne") == ids[1:3]
    assert filtered(enabled="false") == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=x", "cursor=x", "enabled=maybe", "colour=red", "team=%00"]
)
def test_a_query_that_makes_no_sense_is_refused_by_name(server: Server, query: str) -> None:
    answer = server.client.get(f"/api/v1/webhooks?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", query.partition("=")[0]]


@pytest.mark.parametrize(
    "body",
    [
        registration(url="https://user:pw-of-mine@example.com/x"),
        registration(url="http://example.com/\0"),
        registration(team="n\0e"),
        registration(events=["a\0"]),
        registration(events=["a" * 201]),
        registration(team="a" * 201),
        registration(events="game_started"),
        registration(secret=f"{SECRET}\0"),
        registration(secret=[SECRET]),
        registration(secret="whsec_not base64 at all!"),
        {"secret": SECRET},
        [{"secret": SECRET}],
    ],
)
def test_bad_input_is_a_422_that_echoes_no_secret(server: Server, body: Any) -> None:
    for path in ("/api/v1/webhooks/register", "/api/v1/webhooks"):
        answer = server.client.post(path, json=body)
        assert answer.status_code == 422
        assert all({"type", "loc", "msg", "input"} <= set(error) for error in answer.json()["detail"])
        assert SECRET not in answer.text
        assert "pw-of-mine" not in answer.text
        assert "whsec_not" not in answer.text
    assert server.client.get("/api/v1/webhooks").json()["data"] == []


@pytest.mark.parametrize(
    "content",
    [
        b"{nope",
        b"\xff\xfe{}",
        b'{"url": "\xc3"}',
        b'{"url": NaN}',
        b'{"url": "\\ud800", "events": ["\\ud800"], "secret": "\\ud800"}',
        b"[" * 100_000,
        b'{"limit": ' + b"9" * 10_000 + b"}",
        b'"text"',
        b"null",
    ],
)
def test_what_is_not_json_of_ours_is_a_422(server: Server, content: bytes) -> None:
    for method, path in (("POST", "register"), ("POST", ""), ("PATCH", "some-id"), ("POST", "some-id/rotate-secret")):
        path = f"/api/v1/webhooks/{path}".rstrip("/")
        answer = server.client.request(method, path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, answer.text
        assert answer.json()["detail"][0]["loc"][0] == "body"


def test_a_body_over_the_limit_is_413_declared_or_not(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    exact = json.dumps(registration(padding="")).encode()
    exact = exact.replace(b'"padding": ""', b'"padding": "' + b"x" * (1024**2 - len(exact)) + b'"')
    assert len(exact) == 1024**2
    path = "/api/v1/webhooks/register"
    assert server.client.post(path, content=exact, headers=headers).status_code == 201
    for content in (exact + b" ", iter([exact, b" "])):
        answer = server.client.post(path, content=content, headers=headers)
        assert answer.status_code == 413
        assert "limit" in answer.json()["detail"]


def test_every_other_error_is_json_too(server: Server) -> None:
    cases = [("GET", "/nowhere", 404), ("PUT", "/api/v1/webhooks", 405), ("POST", "/api/v1/webhooks/list", 405)]
    for method, path, status in cases:
        answer = server.client.request(method, path)
        assert answer.status_code == status
        assert isinstance(answer.json()["detail"], str)
    answer = server.client.post("/api/v1/webhooks", content="x=1", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert isinstance(answer.json()["detail"], str)


def test_registrations_persist_after_a_restart_of_the_process(server: Server) -> None:
    webhook_id = server.register().json()["webhook_id"]
    printed = server.stop(signal.SIGTERM)
    assert "Traceback" not in printed
    assert SECRET not in printed
    server.start()
    assert server.client.get(f"/api/v1/webhooks/{webhook_id}").status_code == 200


def test_the_imported_file_is_served_and_given_back(server: Server) -> None:
    file = server.place.folder / "webhooks.json"
    file.write_text(json.dumps(recorded("webhooks.json")))
    assert manage(server.place, "import", str(file)).returncode == 0
    shown = server.client.get("/api/v1/webhooks/list").json()["webhooks"]
    expected = [{**entry, "secret": "***", "id": webhook_id} for webhook_id, entry in recorded("webhooks.json").items()]
    assert shown == expected


def test_ready_says_when_the_schema_is_not_current(server: Server) -> None:
    assert server.client.get("/health").json() == {"status": "ok"}
    assert manage(server.place, "migrate", "down").returncode == 0
    answer = server.client.get("/ready")
    assert answer.status_code == 503
    assert "migrate up" in answer.json()["detail"]
