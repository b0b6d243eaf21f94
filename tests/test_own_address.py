"""With loopback allowed the service could deliver to itself: it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hookline.egress import OWN_REFUSED
from tests.conftest import Server, only_sqlite


@only_sqlite
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.0.0.2"])
def test_a_webhook_whose_url_is_the_service_itself_is_never_called(host: str, serve: Callable[..., Server]) -> None:
    server = serve(ALLOWED_NETWORKS="127.0.0.0/8, ::1/128", RETRY_SCHEDULE="1d")
    port = server.client.base_url.port
    created = server.register(url=f"http://{host}:{port}/api/v1/events", events=["*"], team=None)
    assert created.status_code == 201
    server.client.post("/api/v1/events", json={"event_type": "a", "data": {}})
    (delivery,) = server.client.get("/api/v1/deliveries").json()["data"]
    path = f"/api/v1/deliveries/{delivery['delivery_id']}"
    for _ in range(2000):
        if log := server.client.get(path).json()["attempt_log"]:
            break
    assert [(attempt["status_code"], attempt["error"]) for attempt in log] == [(None, OWN_REFUSED)]
    assert len(server.client.get("/api/v1/events").json()["data"]) == 1
