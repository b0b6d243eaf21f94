"""Every setting, from the environment or `.env`: typed, checked and frozen. The only reader of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dotenv import dotenv_values

SIZES = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
LEVELS = ("debug", "info", "warning", "error")


class BadSetting(Exception):
    """One line that names the setting and what it must be."""


@dataclass(frozen=True)
class Settings:
    database_url: str = "sqlite:///data/webhooks.db"
    host: str = "127.0.0.1"
    port: int = 8005
    api_keys: tuple[str, ...] = ()
    allow_anonymous: bool = False
    max_body: int = 1024**2  # bytes
    log_level: str = "info"

    def __repr__(self) -> str:
        return "Settings(...)"  # the keys are secrets


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process: the environment, then `.env`, then the defaults. Raises BadSetting."""
    if environ is None:
        environ = {**{k: v for k, v in dotenv_values(".env").items() if v is not None}, **os.environ}
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    return Settings(
        database_url=_database_url(given.get("DATABASE_URL", Settings.database_url)),
        host=given.get("HOST", Settings.host),
        port=_port(given.get("PORT", str(Settings.port))),
        api_keys=_api_keys(given.get("API_KEYS", "")),
        allow_anonymous=_boolean("ALLOW_ANONYMOUS", given.get("ALLOW_ANONYMOUS", "false")),
        max_body=_size("MAX_BODY", given.get("MAX_BODY", "1MiB")),
        log_level=_one_of("LOG_LEVEL", given.get("LOG_LEVEL", Settings.log_level).lower(), LEVELS),
    )


def _database_url(text: str) -> str:
    if not re.fullmatch(r"sqlite:///.+", text):
        raise BadSetting("DATABASE_URL must be like sqlite:///data/webhooks.db")
    return text


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise BadSetting(f"PORT must be a number from 0 to 65535, not {text!r}")
    return int(text)


def _api_keys(text: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise BadSetting(f"{name} must be true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def _size(name: str, text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})\s*([KMG]iB|B|)", text)
    if match is None or int(match[1]) == 0:
        raise BadSetting(f"{name} must be a size like 256KiB or 1MiB, not {text!r}")
    return int(match[1]) * SIZES[match[2]]


def _one_of(name: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise BadSetting(f"{name} must be one of {', '.join(choices)}, not {text!r}")
    return text
