"""Settings: their text is read into values, and a wrong one is refused in one line."""

from __future__ import annotations

import re
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest

import settings
from hookline import policy
from tests.conftest import ROOT, manage
from tests.databases import Place


def test_the_example_file_shows_the_defaults() -> None:
    example = (ROOT / ".env.example").read_text()
    assert settings.load(dict(re.findall(r"^#([A-Z_]+)=(.*)$", example, re.MULTILINE))) == settings.Settings()
    assert settings.load({}) == settings.Settings()


def test_the_defaults_are_those_of_the_library() -> None:
    config = settings.Settings()
    assert (
        policy.Rules(
            retry_schedule=config.retry_schedule,
            disable_after=config.disable_after,
            lease=config.lease,
            timeout=config.delivery_timeout,
            concurrency=config.worker_concurrency,
            retention=config.retention,
            max_payload=config.max_payload,
        )
        == policy.DEFAULT
    )


def test_every_setting_is_read() -> None:
    environ = {
        "DATABASE_URL": "sqlite:////var/lib/hookline/webhooks.db",
        "DATABASE_POOL": "3",
        "ALLOW_EPHEMERAL_SQLITE": "yes",
        "HOST": "0.0.0.0",
        "PORT": "80",
        "API_KEYS": "the-first-key-of-two, the-second-key-of-two,",
        "ALLOW_ANONYMOUS": "True",
        "TRUSTED_PROXIES": "127.0.0.1 10.0.0.0/8",
        "ALLOWED_NETWORKS": "192.168.0.0/16, fd00::/8",
        "RUN_WORKER": "no",
        "WORKER_CONCURRENCY": "8",
        "DELIVERY_TIMEOUT": "500ms",
        "LEASE": "5s",
        "RETRY_SCHEDULE": "1s 2m",
        "DISABLE_AFTER": "1h",
        "RETENTION": "off",
        "MAX_BODY": "2 MiB",
        "MAX_PAYLOAD": "1KiB",
        "LOG_LEVEL": "DEBUG",
    }
    expected = settings.Settings(
        database_url="sqlite:////var/lib/hookline/webhooks.db",
        database_pool=3,
        allow_ephemeral_sqlite=True,
        host="0.0.0.0",
        port=80,
        api_keys=("the-first-key-of-two", "the-second-key-of-two"),
        allow_anonymous=True,
        trusted_proxies=(ip_network("127.0.0.1/32"), ip_network("10.0.0.0/8")),
        allowed_networks=(ip_network("192.168.0.0/16"), ip_network("fd00::/8")),
        run_worker=False,
        worker_concurrency=8,
        delivery_timeout=0.5,
        lease=5,
        retry_schedule=(1, 120),
        disable_after=3600,
        retention=None,
        max_body=2 * 1024**2,
        max_payload=1024,
        log_level="debug",
    )
    assert environ.keys() == {field.name.upper() for field in fields(settings.Settings)}
    assert settings.load(environ) == expected
    assert "first-key" not in repr(settings.load(environ))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "webhooks.db"),
        ("DATABASE_URL", "mysql://localhost/x"),
        ("DATABASE_POOL", "0"),
        ("RETENTION", "30"),
        ("RETENTION", "36501d"),
        ("DISABLE_AFTER", "999999999d"),
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "9" * 5000),
        ("PORT", "\u0663"),
        ("DATABASE_POOL", "9" * 5000),
        ("MAX_BODY", "\u0663MiB"),
        ("LEASE", "\u0663m"),
        ("DATABASE_URL", "sqlite:///\udcff.db"),
        ("DATABASE_URL", "sqlite:///a\0b.db"),
        ("API_KEYS", "\udcff" * 20),
        ("ALLOW_ANONYMOUS", "perhaps"),
        ("TRUSTED_PROXIES", "*"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("ALLOWED_NETWORKS", "192.168.0.1/16"),
        ("ALLOWED_NETWORKS", "home"),
        ("WORKER_CONCURRENCY", "0"),
        ("DELIVERY_TIMEOUT", "15"),
        ("LEASE", "15s"),
        ("RETRY_SCHEDULE", "5s, soon"),
        ("DISABLE_AFTER", "0d"),
        ("MAX_BODY", "1MB"),
        ("MAX_BODY", "0"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_setting(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(settings.BadSetting, match=name) as caught:
        settings.load({name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "secrets"),
    [
        (",", []),
        (" , ,, ", []),
        ("short-key-of-me", ["short-key-of-me"]),
        ("a-first-key-that-holds,brief", ["a-first-key", "brief"]),
        ("schlüssel-mit-umlaut", ["schl", "umlaut"]),
        ("two-keys-without-a-comma another-one-beside-it", ["two-keys", "another-one"]),
        ("a-key-with-a-tab\tin-the-middle", ["a-key-with"]),
    ],
)
def test_keys_that_guard_nothing_stop_the_start_and_are_not_shown(keys: str, secrets: list[str]) -> None:
    with pytest.raises(settings.BadSetting, match="API_KEYS") as caught:
        settings.load({"API_KEYS": keys})
    assert "\n" not in str(caught.value)
    assert not any(secret in str(caught.value) for secret in secrets)


def test_a_wrong_value_stops_a_command_without_a_traceback(tmp_path: Path) -> None:
    done = manage(Place(f"sqlite:///{tmp_path}/webhooks.db", tmp_path), "migrate", "status", PORT="http")
    assert done.returncode == 1
    assert "PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_sqlite_is_refused_where_the_disk_is_lost_at_a_restart() -> None:
    heroku = {"DYNO": "web.1"}
    with pytest.raises(settings.BadSetting, match=r"Heroku loses its disk.*PostgreSQL.*ALLOW_EPHEMERAL_SQLITE=true"):
        settings.load(heroku)
    assert settings.load(heroku | {"ALLOW_EPHEMERAL_SQLITE": "true"}).database_url.startswith("sqlite:")
    for scheme in ("postgres", "postgresql"):
        assert settings.load(heroku | {"DATABASE_URL": f"{scheme}://user:secret@host/name"})


def test_sqlite_is_served_from_a_volume_that_lasts() -> None:
    railway = {"RAILWAY_ENVIRONMENT": "production", "RAILWAY_VOLUME_MOUNT_PATH": "/data"}
    assert settings.load(railway | {"DATABASE_URL": "sqlite:////data/webhooks.db"})
    for elsewhere in ("sqlite:///webhooks.db", "sqlite:////database/webhooks.db", "sqlite:////data/../webhooks.db"):
        with pytest.raises(settings.BadSetting, match="Railway"):
            settings.load(railway | {"DATABASE_URL": elsewhere})


def test_an_env_file_that_is_not_utf_8_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PORT=8005\nAPI_KEYS=\xff\xfe\n")
    for command in (["migrate", "status"], ["worker"], ["publish", "a", "{}"]):
        done = manage(Place(f"sqlite:///{tmp_path}/webhooks.db", tmp_path), *command)
        assert (done.returncode, done.stderr) == (1, "Error: the file .env is not UTF-8, from its byte 19 on\n")
