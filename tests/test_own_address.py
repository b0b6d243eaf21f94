"""With loopback allowed the service could deliver to itself: it does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import pytest

from hookline.egress.guard import OWN_REFUSED
from tests.conftest import ROOT, Server, environment, manage, only_sqlite
from tests.databases import Place


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


def test_the_port_that_port_0_became_is_the_services_own(tmp_path: Path) -> None:
    place = Place(f"sqlite:///{tmp_path}/webhooks.db", tmp_path)
    assert manage(place, "migrate", "up").returncode == 0
    env = environment(DATABASE_URL=place.url, PORT="0", ALLOWED_NETWORKS="127.0.0.0/8", RETRY_SCHEDULE="1d")
    process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=env, cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().decode().split()[-1]
        with httpx.Client(base_url=url, timeout=60) as client:
            body = {"url": f"{url}/api/v1/events", "events": ["*"]}
            assert client.post("/api/v1/webhooks", json=body).status_code == 201
            client.post("/api/v1/events", json={"event_type": "a", "data": {}})
            for _ in range(2000):
                (delivery,) = client.get("/api/v1/deliveries").json()["data"]
                if delivery["attempts"]:
                    break
            log = client.get(f"/api/v1/deliveries/{delivery['delivery_id']}").json()["attempt_log"]
        assert [attempt["error"] for attempt in log] == [OWN_REFUSED]
    finally:
        process.terminate()
        process.communicate(timeout=30)
