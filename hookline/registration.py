"""What a registration is, and what no edge lets through."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hookline.errors import Invalid

MIN_SECRET = 16  # characters
MAX_EVENTS = 1000  # event types of one webhook
MIN_RATE, MAX_RATE = 0.0001, 10_000.0  # deliveries per second of one webhook: one in three hours at least
MAX_NAME = 200  # characters of an event type or a team: three names fit into an index of PostgreSQL


class Registration(NamedTuple):
    """What registering takes."""

    url: str
    events: Sequence[str]
    secret: str
    team: str | None = None
    description: str | None = None
    headers: Mapping[str, str] | None = None


def generate_secret() -> str:
    """A new secret: `whsec_` and the base64 of 32 random bytes (Standard Webhooks 1.0.0)."""
    return "whsec_" + base64.b64encode(os.urandom(32)).decode()


def check(
    url: str, events: Sequence[str], secret: str | None, team: str | None, description: str | None = None
) -> None:
    """Refuse what no edge should let through. Raises Invalid; no message holds a secret."""
    if not url.lower().startswith(("http://", "https://")):
        raise Invalid("url must start with http:// or https://")
    if isinstance(events, str) or len(events) > MAX_EVENTS:
        raise Invalid(f"events must be a list of at most {MAX_EVENTS} event types")
    if not all(isinstance(event, str) for event in events):
        raise Invalid("events must be a list of strings")
    for name, text in (("team", team), *(("events", event) for event in events)):
        check_text(name, text)
        if len(text or "") > MAX_NAME:
            raise Invalid(f"{name} must not be longer than {MAX_NAME} characters")
    check_text("url", url)
    check_text("description", description)
    if secret is not None:
        check_secret(secret)


def check_rate(rate_limit: float | None) -> None:
    """Raises Invalid for what no lane can keep to."""
    if rate_limit is not None and not MIN_RATE <= rate_limit <= MAX_RATE:
        raise Invalid(f"rate_limit must be from {MIN_RATE} to {MAX_RATE:.0f} deliveries per second")


def check_secret(secret: str) -> None:
    """Raises Invalid unless it is long enough and, with the prefix `whsec_`, base64."""
    if len(secret) < MIN_SECRET:
        raise Invalid(f"secret must have at least {MIN_SECRET} characters")
    check_text("secret", secret)
    if (problem := secret_problem(secret)) is not None:
        raise Invalid(f"secret {problem}")


def secret_problem(secret: str) -> str | None:
    """What is wrong with a `whsec_` secret, None if nothing."""
    if not secret.startswith("whsec_"):
        return None
    encoded_key = secret.removeprefix("whsec_")
    try:
        base64.b64decode(encoded_key + "=" * (-len(encoded_key) % 4), validate=True)
    except ValueError:
        return "starts with whsec_ but the rest is not base64"
    return None


def check_text(name: str, text: str | None) -> None:
    """Raises Invalid for what the two databases would store differently: NUL and lone surrogates."""
    if text is not None and (problem := text_problem(text)) is not None:
        raise Invalid(f"{name} {problem}")


def text_problem(text: str) -> str | None:
    """Why this cannot be stored, None if it can."""
    if "\0" in text:
        return "must not contain NUL characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "must not contain lone surrogates"
    return None
