"""No input gives a 500: what cannot be stored or shown again is a 422, on every route, and every answer is JSON."""

from __future__ import annotations

import base64
import json
import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peewee import Database
from starlette.routing import Route
from starlette.testclient import TestClient

import hookline
from hookline import WebhookManager, history
from hookline.errors import Conflict, Invalid
from tests.conftest import SECRET, Server, registration
from web import api

JSON = {"Content-Type": "application/json"}
PATHS = [
    ("POST", "/api/v1/webhooks/register"),
    ("POST", "/api/v1/webhooks"),
    ("PATCH", "/api/v1/webhooks/ID"),
    ("POST", "/api/v1/webhooks/ID/rotate-secret"),
    ("POST", "/api/v1/webhooks/ID/test"),
    ("POST", "/api/v1/webhooks/ID/replay"),
    ("POST", "/api/v1/events"),
]


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def cursor_of(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def registered(client: TestClient) -> str:
    return str(client.post("/api/v1/webhooks/register", json=registration()).json()["webhook_id"])


@pytest.mark.parametrize(
    "value", [nested(65), nested(700), '{"a":' * 300 + "1" + "}" * 300, '"\\ud800"', '"\\udc00x"', '{"\\ud800": 1}']
)
def test_an_unknown_field_that_cannot_be_shown_again_is_a_422_on_every_route(client: TestClient, value: str) -> None:
    webhook_id = registered(client)
    for method, path in PATHS:
        content = '{"event_type": "a", "data": {}, "unknown": ' + value + "}"
        answer = client.request(method, path.replace("ID", webhook_id), content=content, headers=JSON)
        assert (answer.status_code, answer.json()["detail"][0]["loc"][0]) == (422, "body"), path


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" * 5000, "1" * 4000])
def test_a_number_that_is_out_of_range_is_a_422_wherever_a_number_goes(client: TestClient, number: str) -> None:
    webhook = f"/api/v1/webhooks/{registered(client)}"
    for method, path, content in [
        ("PATCH", webhook, f'{{"rate_limit": {number}}}'),
        ("PATCH", webhook, f'{{"retry_schedule": [{number}]}}'),
        ("PATCH", webhook, f'{{"colour": {number}}}'),
        ("PATCH", webhook, f'{{"enabled": {number}}}'),
        ("POST", f"{webhook}/rotate-secret", f'{{"overlap_seconds": {number}}}'),
        ("POST", f"{webhook}/replay", f'{{"since": {number}}}'),
        ("POST", "/api/v1/webhooks", f'{{"url": {number}, "events": [{number}]}}'),
        ("POST", "/api/v1/events", f'{{"event_type": {number}, "data": {{"n": {number}}}}}'),
    ]:
        answer = client.request(method, path, content=content, headers=JSON)
        assert answer.status_code == 422, content[:50]
        assert answer.json()["detail"]
    answer = client.post("/api/v1/events", content=f'{{"event_type": "a", "data": [{number}]}}', headers=JSON)
    assert answer.status_code == 422


@pytest.mark.parametrize("text", [nested(300), nested(100_000), "9" * 5000, "[1e400]", '["\\ud800"]', "{}"])
def test_a_cursor_that_is_none_of_ours_is_a_422(client: TestClient, text: str) -> None:
    for path in ("webhooks", "events", "deliveries"):
        answer = client.get(f"/api/v1/{path}", params={"cursor": cursor_of(text)[:30_000]})
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", "cursor"])


def test_what_is_accepted_is_shown_again_up_to_64_levels_and_no_more(server: Server) -> None:
    def publish(data: str) -> Any:
        content = f'{{"event_type": "a", "data": {data}}}'
        return server.client.post("/api/v1/events", content=content, headers=JSON)

    deepest = f'{{"x": {nested(62)}, "nul": "a\\u0000b", "rare": "\\ud83d\\ude00", "n": {"1" * 4000}, "f": 1e308}}'
    published = publish(deepest)
    assert published.status_code == 202
    shown = server.client.get(f"/api/v1/events/{published.json()['event_id']}").json()["data"]
    assert {name: shown[name] for name in ("x", "nul", "rare", "n", "f")} == json.loads(deepest)
    for data in (f'{{"x": {nested(63)}}}', '{"x": "\\ud83d"}', '{"x": {"\\ude00": 1}}', '{"x": 1e400}'):
        assert publish(data).status_code == 422
    assert len(server.client.get("/api/v1/events").json()["data"]) == 1


def test_python_callers_are_refused_the_same(db: Database, manager: WebhookManager) -> None:
    deep: Any = 1
    for _ in range(64):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    for value in (deep, circle, {"a": [deep]}, "\ud800", {"\udfff": 1}, float("inf"), 10**5000, {1}):
        with pytest.raises(Invalid, match="data"):
            hookline.publish("a", {"x": value})
    with pytest.raises(Invalid, match="idempotency_key"):
        hookline.publish("a", {}, 5)  # type: ignore[arg-type]
    published = hookline.publish("a", {"x": deep[0], "emoji": "\U0001f600", "nul": "\0"})
    assert history.get(db, published.event_id)["data"]["emoji"] == "\U0001f600"


def test_the_same_content_with_its_keys_in_another_order_is_the_same(db: Database, manager: WebhookManager) -> None:
    first = hookline.publish("goal", {"a": 1, "b": {"c": [1, {"d": 1, "e": None}], "f": 2.0}}, "key")
    again = hookline.publish("goal", {"b": {"f": 2.0, "c": [1, {"e": None, "d": 1}]}, "a": 1}, "key")
    assert again == first._replace(duplicate=True)
    for a in (1.0, True, "1", [1], 2):
        with pytest.raises(Conflict, match="other content"):
            hookline.publish("goal", {"b": {"f": 2.0, "c": [1, {"e": None, "d": 1}]}, "a": a}, "key")
    with pytest.raises(Conflict, match="other content"):
        hookline.publish("goal", {"a": 1, "b": {"c": [{"d": 1, "e": None}, 1], "f": 2.0}}, "key")


weird_text = st.sampled_from(["", "\0", "a\nb", "ä" * 300, "\U0001f600", "*", "webhook.test", "..", "%", "x" * 5000])
text = weird_text | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
branches = st.lists(plain, max_size=4) | st.dictionaries(text, plain, max_size=4)
documents = plain | branches | st.lists(branches, max_size=2) | st.dictionaries(text, branches, max_size=2)
urls = ["http://example.com/x", "http://user:p@example.com/", "http://a.local", "https:///x", "http://[::1]:70000/"]
moments = ["2025-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"]
lists: list[Any] = [["a"], ["*", "a"], [], [0.1, 5], [1e300]]
others: list[Any] = ["a", SECRET, "whsec_AAAA", "all", "failed", {"X-Mine": "1"}, {"Host": "x"}, 1, 0.5, 0, -1]
usable = st.sampled_from([*urls, *moments, *lists, *others])
numbers = ["1e400", "-1e400", "1e-400", "NaN", "Infinity", "1" * 400, "9" * 4300, "9" * 5000]
deep = [nested(60), nested(66), nested(300), nested(2000), '{"a":' * 66 + "1" + "}" * 66]
hostile = st.sampled_from([*numbers, *deep, '"\\ud800"', '"\\u0000"', '{"\\udc00":1}', "[1,", '"'])
values = (usable | documents).map(json.dumps) | hostile
fields = [
    "url",
    "events",
    "secret",
    "team",
    "sport",
    "description",
    "headers",
    "enabled",
    "retry_schedule",
    "rate_limit",
    "ordered",
]
fields += ["overlap_seconds", "event_type", "data", "idempotency_key", "since", "until", "status", "dry_run", "x"]
names = st.sampled_from(fields)
objects = st.dictionaries(names, values, max_size=8).map(
    lambda given: "{" + ", ".join(f'"{name}": {value}' for name, value in given.items()) + "}"
)
bodies = st.one_of(
    objects.map(str.encode),
    values.map(str.encode),
    values.map(lambda value: b'{"event_type": "a", "idempotency_key": "k", "data": {"x": ' + value.encode() + b"}}"),
    values.map(lambda value: b'{"url": "http://example.com/", "events": ["a"], "x": ' + value.encode() + b"}"),
    st.binary(max_size=40),
)
cursors = values.map(lambda value: cursor_of(f"[{value}]")) | values.map(
    lambda value: cursor_of(f'["2025-01-01T00:00:00", {value}]')
)
queries = st.dictionaries(
    st.sampled_from(["limit", "cursor", "team", "event", "enabled", "event_type", "webhook_id", "event_id", "status"]),
    cursors | text | st.integers().map(str) | st.sampled_from(["true", "pending", "\ufffd", "9" * 5000]),
    max_size=3,
)
headers = st.fixed_dictionaries(
    {"content-type": st.sampled_from(["application/json", "application/x+json", "text/plain", "", "\xff;;", "*/*"])},
    optional={
        "idempotency-key": st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=300),
        "accept": st.sampled_from(["", "text/html", "\xff"]),
        "content-encoding": st.just("gzip"),
    },
)


def test_no_request_gets_a_500_and_every_answer_is_json(client: TestClient) -> None:
    webhook_id = registered(client)
    event = client.post("/api/v1/events", json={"event_type": "game_started", "data": {"team": "ne"}}).json()
    ids = st.sampled_from([webhook_id, event["event_id"], "1", "register", "list", "9" * 30, "\u0661"])
    ids |= text.map(lambda id_: id_.replace("/", "") or "x")
    routes = [route for route in api.routes if isinstance(route, Route)]
    requests = st.sampled_from(
        [(method, route) for route in routes for method in [*sorted(route.methods or ()), "PUT"]]
    )

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(requests, ids, queries, bodies, headers)
    def attack(
        request: tuple[str, Route], id_: str, query: dict[str, str], body: bytes, header: dict[str, str]
    ) -> None:
        method, route = request
        path = re.sub(r"{[^}]*}", lambda parameter: quote(id_, safe=""), route.path)
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in header.items()]
        answer = client.request(method, path, params=query, content=body, headers=encoded, follow_redirects=False)
        assert answer.status_code < 500, answer.text
        if answer.status_code != 204 and method != "HEAD":
            answer.json()

    attack()
    for path, name in (("webhooks", "webhook_id"), ("events", "event_id"), ("deliveries", "delivery_id")):
        found = client.get(f"/api/v1/{path}", params={"limit": 200})
        assert found.status_code == 200
        for one in found.json()["data"]:
            assert client.get(f"/api/v1/{path}/{one[name]}").status_code == 200
    assert client.get("/api/v1/webhooks/list").status_code == 200
