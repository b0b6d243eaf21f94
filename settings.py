"""Every setting, from the environment or `.env`: typed, checked and frozen. The only reader of the environment."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from dotenv import dotenv_values

SIZES = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}  # seconds
LONGEST = 36500 * 86400.0  # seconds, a century: dates end somewhere
SHORTEST_KEY = 16  # characters of an API key
MARGIN = 2  # seconds of a lease that settling a delivery may take
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
EPHEMERAL = {  # what each host sets in the environment of its processes
    "DYNO": "Heroku",
    "RENDER": "Render",
    "RAILWAY_ENVIRONMENT": "Railway",
    "FLY_APP_NAME": "Fly.io",
    "K_SERVICE": "Cloud Run",
    "KOYEB_APP_NAME": "Koyeb",
    "VCAP_APPLICATION": "Cloud Foundry",
}
LEVELS = ("debug", "info", "warning", "error")


class BadSetting(Exception):
    """One line that names the setting and what it must be."""


@dataclass(frozen=True)
class Settings:
    database_url: str = "sqlite:///data/webhooks.db"
    database_pool: int = 8  # connections to PostgreSQL
    allow_ephemeral_sqlite: bool = False
    host: str = "127.0.0.1"
    port: int = 8005
    api_keys: tuple[str, ...] = ()
    allow_anonymous: bool = False
    trusted_proxies: tuple[Network, ...] = ()
    allowed_networks: tuple[Network, ...] = ()
    run_worker: bool = True
    worker_concurrency: int = 256  # requests in flight
    delivery_timeout: float = 15  # seconds, as are all below
    lease: float = 60
    retry_schedule: tuple[float, ...] = (5, 30, 120, 600, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    disable_after: float = 5 * 86400
    retention: float | None = 30 * 86400  # None: for ever
    max_body: int = 1024**2  # bytes
    max_payload: int = 256 * 1024  # bytes
    log_level: str = "info"

    def __repr__(self) -> str:
        return "Settings(...)"  # the keys are secrets


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process: the environment, then `.env`, then the defaults. Raises BadSetting."""
    if environ is None:
        environ = {**_file(), **os.environ}
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    _require_text(given)
    found = Settings(
        database_url=_database_url(given.get("DATABASE_URL", Settings.database_url)),
        database_pool=_count("DATABASE_POOL", given.get("DATABASE_POOL", str(Settings.database_pool))),
        allow_ephemeral_sqlite=_boolean("ALLOW_EPHEMERAL_SQLITE", given.get("ALLOW_EPHEMERAL_SQLITE", "false")),
        host=given.get("HOST", Settings.host),
        port=_port(given.get("PORT", str(Settings.port))),
        api_keys=_api_keys(given.get("API_KEYS", "")),
        allow_anonymous=_boolean("ALLOW_ANONYMOUS", given.get("ALLOW_ANONYMOUS", "false")),
        trusted_proxies=_networks("TRUSTED_PROXIES", given.get("TRUSTED_PROXIES", "")),
        allowed_networks=_networks("ALLOWED_NETWORKS", given.get("ALLOWED_NETWORKS", "")),
        run_worker=_boolean("RUN_WORKER", given.get("RUN_WORKER", "true")),
        worker_concurrency=_count("WORKER_CONCURRENCY", given.get("WORKER_CONCURRENCY", "256")),
        delivery_timeout=duration("DELIVERY_TIMEOUT", given.get("DELIVERY_TIMEOUT", "15s")),
        lease=duration("LEASE", given.get("LEASE", "60s")),
        retry_schedule=_schedule(given.get("RETRY_SCHEDULE", "5s 30s 2m 10m 30m 2h 5h 10h 14h 20h 24h")),
        disable_after=duration("DISABLE_AFTER", given.get("DISABLE_AFTER", "5d")),
        retention=_retention(given.get("RETENTION", "30d")),
        max_body=_size("MAX_BODY", given.get("MAX_BODY", "1MiB")),
        max_payload=_size("MAX_PAYLOAD", given.get("MAX_PAYLOAD", "256KiB")),
        log_level=_one_of("LOG_LEVEL", given.get("LOG_LEVEL", Settings.log_level).lower(), LEVELS),
    )
    if found.lease < found.delivery_timeout + MARGIN:
        raise BadSetting(f"LEASE must exceed DELIVERY_TIMEOUT by {MARGIN} s or more, or deliveries would be made twice")
    if not found.allow_ephemeral_sqlite:
        _require_lasting(found.database_url, given)
    return found


def _file() -> dict[str, str]:
    """What `.env` says, if it is there."""
    try:
        return {name: value for name, value in dotenv_values(".env").items() if value is not None}
    except UnicodeDecodeError as exc:
        raise BadSetting(f"the file .env is not UTF-8, from its byte {exc.start} on") from exc
    except OSError as exc:
        raise BadSetting(f"the file .env cannot be read: {exc.strerror}") from exc


def _require_text(given: Mapping[str, str]) -> None:
    """The environment may hold any bytes: those that are no UTF-8 reach us as lone surrogates."""
    for field in fields(Settings):
        name = field.name.upper()
        if not re.fullmatch(r"[^\0\ud800-\udfff]*", given.get(name, "")):
            raise BadSetting(f"{name} is not UTF-8, or has a NUL character")


def _database_url(text: str) -> str:
    if not re.fullmatch(r"sqlite:///.+|postgres(ql)?://.+", text):
        raise BadSetting("DATABASE_URL must be like sqlite:///data/webhooks.db or postgresql://user:password@host/name")
    return text


def _require_lasting(url: str, environ: Mapping[str, str]) -> None:
    """Refuse SQLite where the disk is lost at each restart, unless it is on a volume that is known to last."""
    host = next((name for variable, name in EPHEMERAL.items() if variable in environ), None)
    if host is None or not url.startswith("sqlite:"):
        return
    volume = environ.get("RAILWAY_VOLUME_MOUNT_PATH")
    if volume and os.path.abspath(url.removeprefix("sqlite:///")).startswith(os.path.join(volume, "")):
        return
    raise BadSetting(
        f"DATABASE_URL is an SQLite file, and {host} loses its disk at every restart, all webhooks with it: "
        "attach a PostgreSQL and set DATABASE_URL to its URL, or, if the file is on a volume that stays, set "
        "ALLOW_EPHEMERAL_SQLITE=true"
    )


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise BadSetting(f"PORT must be a number from 0 to 65535, not {text!r}")
    return int(text)


def _api_keys(text: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    if text and not keys:
        raise BadSetting("API_KEYS is set, but has no key: leave it out, or name keys separated by commas")
    for number, key in enumerate(keys, 1):
        if not re.fullmatch(rf"[!-~]{{{SHORTEST_KEY},}}", key):  # the message never shows the key
            wanted = f"{SHORTEST_KEY} or more printable ASCII characters without spaces"
            raise BadSetting(f"API_KEYS must be keys separated by commas, each of {wanted}: key {number} is not")
    return keys


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise BadSetting(f"{name} must be true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def _size(name: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})\s*([KMG]iB|B|)", text)
    if match is None or int(match[1]) == 0:
        raise BadSetting(f"{name} must be a size like 256KiB or 1MiB, not {text!r}")
    return int(match[1]) * SIZES[match[2]]


def _networks(name: str, text: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part) for part in re.split(r"[\s,]+", text) if part)
    except ValueError as exc:
        raise BadSetting(f"{name} must be networks like 192.168.0.0/16, separated by commas: {exc}") from exc


def _count(name: str, text: str) -> int:
    if not (re.fullmatch(r"[0-9]{1,5}", text) and 1 <= int(text) <= 10_000):
        raise BadSetting(f"{name} must be a number from 1 to 10000, not {text!r}")
    return int(text)


def duration(name: str, text: str) -> float:
    """Seconds, from text such as `30d`. Raises BadSetting that names the setting."""
    match = re.fullmatch(r"([0-9]{1,9})(ms|s|m|h|d)", text)
    seconds = int(match[1]) * DURATIONS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST:
        raise BadSetting(f"{name} must be a duration like 500ms, 5s, 2m, 5h or 30d, up to 36500d, not {text!r}")
    return seconds


def _retention(text: str) -> float | None:
    return None if text.lower() == "off" else duration("RETENTION", text)


def _schedule(text: str) -> tuple[float, ...]:
    return tuple(duration("RETRY_SCHEDULE", part) for part in re.split(r"[\s,]+", text))


def _one_of(name: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise BadSetting(f"{name} must be one of {', '.join(choices)}, not {text!r}")
    return text
