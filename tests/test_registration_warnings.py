"""Warnings about webhooks that will get nothing: the same over HTTP and from an import."""

from __future__ import annotations

import json
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from peewee import Database
from starlette.testclient import TestClient

from app import create_app
from hookline.registration_warnings import NO_EVENTS, url_warning, warnings_of
from hookline.transfer.json_file import import_file
from settings import Settings
from tests import databases
from tests.conftest import SECRET, registration

HOME = "http://homeassistant.local:8123/x"
LOCAL_NAME = "it will not be delivered to: names in .local"
LITERAL = "it will not be delivered to: 10.0.0.1 is not a public address"


@pytest.mark.parametrize(
    ("url", "networks", "warning"),
    [
        (HOME, "", LOCAL_NAME),
        ("http://HomeAssistant.LOCAL./x", "127.0.0.0/8", LOCAL_NAME),
        (HOME, "192.168.0.0/16", None),
        (HOME, "fd00::/8", None),
        (HOME, "0.0.0.0/0", None),
        ("http://local.example.com/", "", None),
        ("http://10.0.0.1/", "", LITERAL),
        ("http://10.0.0.1/", "10.0.0.0/8", None),
        ("http://example.com/", "", None),
    ],
)
def test_a_url_that_cannot_be_delivered_to_is_warned_of(url: str, networks: str, warning: str | None) -> None:
    allowed = [ip_network(network) for network in networks.split()]
    assert (url_warning(url, allowed) or "").startswith(warning or "")
    assert (url_warning(url, allowed) is None) == (warning is None)


def test_an_empty_list_of_events_is_warned_of_beside_the_url() -> None:
    assert warnings_of("http://example.com/", [], []) == [NO_EVENTS]
    assert warnings_of("http://example.com/", ["a"], []) == []
    assert warnings_of(HOME, [], []) == [NO_EVENTS, url_warning(HOME, [])]


@pytest.mark.parametrize(
    ("changes", "networks", "warning"),
    [
        ({"events": []}, "", NO_EVENTS),
        ({"url": HOME}, "", LOCAL_NAME),
        ({"url": HOME}, "192.168.0.0/16", ""),
        ({}, "", ""),
    ],
)
def test_the_api_answers_warnings_and_the_replaced_endpoint_logs_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], networks: str, warning: str
) -> None:
    with databases.migrated("sqlite", tmp_path) as place:
        allowed = tuple(ip_network(network) for network in networks.split())
        config = Settings(place.url, run_worker=False, allow_anonymous=True, allowed_networks=allowed)
        with TestClient(create_app(config)) as client:
            created = client.post("/api/v1/webhooks", json=registration(**changes))
            changed = client.patch(created.headers["location"], json=changes)
            for answer in (created, changed):
                assert [text.startswith(warning) for text in answer.json()["warnings"]] == [True] * bool(warning)
            assert client.post("/api/v1/webhooks/register", json=registration(**changes)).status_code == 201
    assert (warning in caplog.text) and bool(caplog.records) == bool(warning)


def test_an_import_warns_of_the_same_urls(db: Database, tmp_path: Path) -> None:
    file = tmp_path / "webhooks.json"
    urls = {"home": HOME, "router": "http://10.0.0.1/", "outside": "http://example.com/"}
    file.write_text(json.dumps({name: {"url": url, "events": ["a"], "secret": SECRET} for name, url in urls.items()}))
    report = import_file(db, file, dry_run=True)
    assert report.warnings == [f"{name}: {url_warning(urls[name], [])}" for name in ("home", "router")]
