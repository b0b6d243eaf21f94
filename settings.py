"""Settings, from the environment or `.env`: typed, checked and frozen.

Nothing else reads the environment, and no other place has defaults for the service.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dotenv import dotenv_values

SIZES = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}  # seconds
LONGEST = 36500 * 86400.0  # seconds, a century: no date may be after the year 9999
SHORTEST_KEY = 16  # characters of an API key
MARGIN = 2  # seconds that settling a delivery may take: part of its lease
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
EPHEMERAL = {  # a variable that a host sets for its processes, and the name of the host
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
    """A setting that cannot be used. The message is one line, and says what the setting must be."""


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
    delivery_timeout: float = 15.0  # seconds, as all durations below
    lease: float = 60.0
    retry_schedule: tuple[float, ...] = (5, 30, 120, 600, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
    disable_after: float = 5 * 86400.0
    retention: float | None = 30 * 86400.0  # None: for ever
    max_body: int = 1024**2  # bytes
    max_payload: int = 256 * 1024  # bytes
    log_level: str = "info"

    def __repr__(self) -> str:
        return "Settings(...)"  # the keys are secrets


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings of this process: the environment, then `.env`, then the defaults. Raises BadSetting."""
    if environ is None:
        environ = {**_file(), **os.environ}
    texts = {name: value.strip() for name, value in environ.items() if value.strip()}
    values: dict[str, Any] = {}
    for field, parse in PARSERS.items():
        name = field.upper()
        if name in texts:
            _require_text(name, texts[name])
            values[field] = parse(name, texts[name])
    config = Settings(**values)
    if config.lease < config.delivery_timeout + MARGIN:
        raise BadSetting(f"LEASE must exceed DELIVERY_TIMEOUT by {MARGIN} s or more, or deliveries would be made twice")
    if not config.allow_ephemeral_sqlite:
        _require_lasting(config.database_url, texts)
    return config


def _file() -> dict[str, str]:
    """Return the variables of `.env`, none if there is no such file. Raises BadSetting."""
    try:
        return {name: value for name, value in dotenv_values(".env").items() if value is not None}
    except UnicodeDecodeError as exc:
        raise BadSetting(f"the file .env is not UTF-8, from its byte {exc.start} on") from exc
    except OSError as exc:
        raise BadSetting(f"the file .env cannot be read: {exc.strerror}") from exc


def _require_text(name: str, text: str) -> None:
    """Refuse bytes that are not UTF-8: Python gives them as lone surrogates."""
    if not re.fullmatch(r"[^\0\ud800-\udfff]*", text):
        raise BadSetting(f"{name} is not UTF-8, or has a NUL character")


def _database_url(name: str, text: str) -> str:
    if not re.fullmatch(r"sqlite:///.+|postgres(ql)?://.+", text):
        raise BadSetting(f"{name} must be like sqlite:///data/webhooks.db or postgresql://user:password@host/name")
    return text


def _require_lasting(url: str, environ: Mapping[str, str]) -> None:
    """Refuse an SQLite file on a host that loses its disk at each restart, unless it is on a volume that lasts."""
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


def _port(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise BadSetting(f"{name} must be a number from 0 to 65535, not {text!r}")
    return int(text)


def _api_keys(name: str, text: str) -> tuple[str, ...]:
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    if text and not keys:
        raise BadSetting(f"{name} is set, but has no key: leave it out, or name keys separated by commas")
    for number, key in enumerate(keys, 1):
        if not re.fullmatch(rf"[!-~]{{{SHORTEST_KEY},}}", key):  # the message never shows the key
            wanted = f"{SHORTEST_KEY} or more printable ASCII characters without spaces"
            raise BadSetting(f"{name} must be keys separated by commas, each of {wanted}: key {number} is not")
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
    """Return the seconds of a text such as `30d`. Raises BadSetting that has `name`."""
    match = re.fullmatch(r"([0-9]{1,9})(ms|s|m|h|d)", text)
    seconds = int(match[1]) * DURATIONS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST:
        raise BadSetting(f"{name} must be a duration like 500ms, 5s, 2m, 5h or 30d, up to 36500d, not {text!r}")
    return seconds


def _retention(name: str, text: str) -> float | None:
    return None if text.lower() == "off" else duration(name, text)


def _schedule(name: str, text: str) -> tuple[float, ...]:
    return tuple(duration(name, part) for part in re.split(r"[\s,]+", text))


def _level(name: str, text: str) -> str:
    if text.lower() not in LEVELS:
        raise BadSetting(f"{name} must be one of {', '.join(LEVELS)}, not {text!r}")
    return text.lower()


def _text(name: str, text: str) -> str:
    return text


PARSERS: dict[str, Callable[[str, str], Any]] = {  # by field: from the setting's name and text to the field's value
    "database_url": _database_url,
    "database_pool": _count,
    "allow_ephemeral_sqlite": _boolean,
    "host": _text,
    "port": _port,
    "api_keys": _api_keys,
    "allow_anonymous": _boolean,
    "trusted_proxies": _networks,
    "allowed_networks": _networks,
    "run_worker": _boolean,
    "worker_concurrency": _count,
    "delivery_timeout": duration,
    "lease": duration,
    "retry_schedule": _schedule,
    "disable_after": duration,
    "retention": _retention,
    "max_body": _size,
    "max_payload": _size,
    "log_level": _level,
}
