"""Who may call, against the real server where it can be, and as a table of requests where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Server
from web.access import Access

KEY = "first-key-of-mine"


async def nothing(scope: object, receive: object, send: object) -> None:
    raise AssertionError("not called")


def status(
    client: str | None, host: str, *, keys: tuple[str, ...] = (), anonymous: bool = False, sent: str = ""
) -> int:
    """What a GET of /api/v1/webhooks is answered by the middleware; 200 where it is let through."""
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
