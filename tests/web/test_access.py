"""Access control, against the real server where possible, else as tables of requests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import httpx2 as httpx
import pytest
from starlette.routing import Route

from tests.conftest import ROOT, Server, environment, only_sqlite, registration
from tests.databases import Place, free_port
from web import api
from web.access import Access

KEY = "first-key-of-mine"


async def nothing(scope: object, receive: object, send: object) -> None:
    raise AssertionError("not called")


def status(
    client: str | None, host: str, *, keys: tuple[str, ...] = (), anonymous: bool = False, sent: str = ""
) -> int:
    """Return the status with which the middleware answers a GET of /api/v1/webhooks; 200 if it lets it through."""
    headers = [(b"host", host.encode()), (b"authorization", sent.encode("latin-1"))]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/api/v1/webhooks",
        "headers": headers,
        "client": client and (client, 1),
    }
    refusal = Access(nothing, keys, anonymous).refusal(scope)
    return refusal.status_code if refusal else 200


@pytest.mark.parametrize(
    ("client", "host", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:8005", 200),
        ("127.8.9.1", "localhost", 200),
        ("::1", "[::1]:8005", 200),
        ("127.0.0.1", "localhost.:8005", 200),
        ("127.0.0.1", "LOCALHOST.", 200),
        ("127.0.0.1", "localhost.example.com.", 403),
        ("192.168.1.20", "127.0.0.1:8005", 403),
        ("8.8.8.8", "hooks.example.com", 403),
        ("127.0.0.1", "rebound.example.com:8005", 403),
        (None, "localhost", 403),
    ],
)
def test_without_keys_only_loopback_is_served(client: str | None, host: str, expected: int) -> None:
    assert status(client, host) == expected
    assert status(client, host, anonymous=True) == 200


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Bearer second-key", 200),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        ("Bearer \xe9", 401),
        ("Bearer ", 401),
        ("", 401),
    ],
)
def test_with_keys_one_of_them_is_wanted_even_from_loopback(sent: str, expected: int) -> None:
    assert status("127.0.0.1", "localhost", keys=(KEY, "second-key"), sent=sent) == expected
    assert status("127.0.0.1", "localhost", keys=(KEY, "second-key"), sent=sent, anonymous=True) == expected


def test_the_server_wants_a_key_for_all_but_health_and_ready(serve: Callable[..., Server]) -> None:
    server = serve(API_KEYS=f"{KEY}, the-other-key-of-mine")
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/ready").status_code == 200
    for path in ("/api/v1/webhooks", "/api/v1/webhooks/list", "/nowhere"):
        refused = server.client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert KEY not in refused.text
    assert server.client.get("/api/v1/webhooks", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert KEY not in server.stop()


def test_the_server_tells_another_machine_which_setting_to_use(serve: Callable[..., Server]) -> None:
    server = serve()
    refused = server.client.get("/api/v1/webhooks", headers={"X-Forwarded-For": "203.0.113.9"})
    assert refused.status_code == 403
    assert "API_KEYS" in refused.json()["detail"]
    assert "ALLOW_ANONYMOUS" in refused.json()["detail"]


def sent(method: str, headers: dict[str, str], *, key: str = "", scheme: str = "http", anonymous: bool = False) -> int:
    """Return the status for a request from this machine, as `status` above."""
    named = {"host": "localhost:8005", "authorization": f"Bearer {key}"} | headers
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
    scope = {"type": "http", "method": method, "path": "/api/v1/events", "headers": encoded, "scheme": scheme}
    refusal = Access(nothing, [key] if key else [], anonymous).refusal({**scope, "client": ("127.0.0.1", 1)})
    return refusal.status_code if refusal else 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"origin": "http://localhost:8005"}, 200),
        ({"origin": "http://LOCALHOST:8005", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://localhost", "host": "localhost:80"}, 200),
        ({"origin": "http://[::1]:8005", "host": "[::1]:8005"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://127.0.0.1:8005"}, 403),
        ({"origin": "https://localhost:8005"}, 403),
        ({"origin": "http://localhost:8005.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "\xe9"}, 403),
        ({"origin": "http://localhost:8005", "sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_a_page_of_another_origin_reads_but_changes_nothing(headers: dict[str, str], expected: int) -> None:
    for method in ("POST", "PATCH", "PUT", "DELETE", "BREW"):
        assert sent(method, headers) == expected
        assert sent(method, headers, key=KEY) == expected
        assert sent(method, headers, anonymous=True) == expected
    for method in ("GET", "HEAD", "OPTIONS"):
        assert sent(method, headers) == 200


def test_the_scheme_is_part_of_an_origin() -> None:
    assert sent("POST", {"origin": "https://localhost", "host": "localhost:443"}, scheme="https") == 200
    assert sent("POST", {"origin": "https://localhost", "host": "localhost"}, scheme="https") == 200
    assert sent("POST", {"origin": "http://localhost", "host": "localhost"}, scheme="https") == 403


def changing() -> list[tuple[str, str]]:
    """Every route that changes something: method and path."""
    return [
        (method, re.sub(r"{\w+}", "1", route.path_format))
        for route in api.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method not in ("GET", "HEAD")
    ]


LEGACY = [("POST", "/api/v1/webhooks/register"), ("DELETE", "/api/v1/webhooks/1")]


@only_sqlite
def test_a_web_page_cannot_drive_a_local_hookline(server: Server) -> None:
    assert set(LEGACY) < set(changing())
    for method, path in changing():
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = server.client.request(method, path, json=registration(), headers=headers)
            assert (answer.status_code, "Origin" in answer.json()["detail"]) == (403, True)
            blob = server.client.request(method, path, content=b"{}", headers=headers)  # has no type
            assert blob.status_code == 403
    assert server.client.get("/api/v1/webhooks", headers={"Origin": "http://evil.example"}).json()["data"] == []
    own = {"Origin": str(server.client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert server.client.post("/api/v1/webhooks", json=registration(), headers=own).status_code == 201


@only_sqlite
def test_new_routes_want_json_by_name(server: Server) -> None:
    """An older browser sends a form, or a Blob without a type, and no Origin."""
    form = "application/x-www-form-urlencoded"
    for method, path in set(changing()) - set(LEGACY):
        for content_type in (form, "text/plain", "multipart/form-data; boundary=x", "application/jsonp"):
            for content in (b"", b"a=1", b"{}"):
                headers = {"Content-Type": content_type}
                assert server.client.request(method, path, content=content, headers=headers).status_code == 415
        assert server.client.request(method, path, content=b"{}").status_code == 415
        for content_type in ("application/json", "Application/JSON; charset=utf-8"):
            answer = server.client.request(method, path, content=b"{", headers={"Content-Type": content_type})
            assert answer.status_code == 422
    assert server.client.post("/api/v1/deliveries/1/cancel").status_code == 404
    assert server.client.post("/api/v1/deliveries/1/cancel", json={"reason": "none"}).status_code == 422


@only_sqlite
def test_a_delivery_changes_nothing_wherever_it_arrives(server: Server) -> None:
    for method, path in changing():
        for name in ("webhook-signature", "X-Webhook-Signature"):
            answer = server.client.request(method, path, json=registration(), headers={name: "v1,of-any-kind"})
            assert (answer.status_code, "webhook-signature" in answer.json()["detail"]) == (508, True)
    listed = server.client.get("/api/v1/webhooks", headers={"webhook-signature": "v1,of-any-kind"})
    assert (listed.status_code, listed.json()["data"]) == (200, [])


@pytest.mark.parametrize(
    "name", ["forwarded", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-real-ip", "via"]
)
def test_what_came_through_a_proxy_is_not_local_without_keys(name: str) -> None:
    for method in ("GET", "POST"):
        assert sent(method, {name: "127.0.0.1"}) == 403
        assert sent(method, {name: ""}) == 403
        assert sent(method, {name: "127.0.0.1"}, key=KEY) == 200
        assert sent(method, {name: "127.0.0.1"}, anonymous=True) == 200
        assert sent(method, {f"not-{name}": "127.0.0.1"}) == 200


@only_sqlite
def test_a_proxy_in_front_without_keys_is_told_to_set_api_keys(serve: Callable[..., Server]) -> None:
    for settings in ({}, {"TRUSTED_PROXIES": "127.0.0.0/8", "FORWARDED_ALLOW_IPS": "*"}):
        client = serve(**settings).client
        for sent in ({"X-Forwarded-For": "127.0.0.1"}, {"Via": "1.1 proxy"}, {"X-Real-IP": "127.0.0.1"}):
            answer = client.get("/api/v1/webhooks", headers=sent)
            assert (answer.status_code, "set API_KEYS" in answer.json()["detail"]) == (403, True)
        assert client.get("/api/v1/webhooks").status_code == 200
        assert client.get("/health", headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 200
    anonymous = serve(ALLOW_ANONYMOUS="true").client
    assert anonymous.get("/api/v1/webhooks", headers={"X-Forwarded-For": "203.0.113.9"}).status_code == 200


@only_sqlite
@pytest.mark.parametrize(("trusted", "believed"), [("", False), ("10.0.0.0/8", False), ("10.0.0.0/8 127.0.0.1", True)])
def test_only_trusted_proxies_are_believed(serve: Callable[..., Server], trusted: str, believed: bool) -> None:
    server = serve(API_KEYS=KEY, TRUSTED_PROXIES=trusted, FORWARDED_ALLOW_IPS="*", LOG_LEVEL="debug")
    server.client.headers.update({"Authorization": f"Bearer {KEY}", "Host": "hooks.example.com"})
    proxied = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https", "Origin": "https://hooks.example.com"}
    answer = server.client.post("/api/v1/webhooks", json=registration(), headers=proxied)
    assert answer.status_code == (201 if believed else 403)
    if not believed:
        assert "TRUSTED_PROXIES" in answer.json()["detail"]
    printed = server.stop()
    assert ("203.0.113.9" in printed) == believed
    assert KEY not in printed


@only_sqlite
def test_another_asgi_server_gets_the_same_checks(place: Place) -> None:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)]
    env = environment(DATABASE_URL=place.url, PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout
        assert any("running on" in line for line in process.stdout)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            answers = [
                client.get("/api/v1/webhooks", headers={"X-Forwarded-For": "127.0.0.1"}),
                client.post("/api/v1/webhooks", json=registration(), headers={"Origin": "http://evil.example"}),
                client.get("/api/v1/webhooks"),
            ]
        assert [answer.status_code for answer in answers] == [403, 403, 200]
        assert all(answer.headers["x-content-type-options"] == "nosniff" for answer in answers)
    finally:
        process.terminate()
        process.communicate(timeout=20)
