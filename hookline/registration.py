"""A registration of a webhook, and the one check of its fields, for HTTP, Python and imports alike.

An import keeps registrations that the replaced service let in: it checks the shape of each field, but not every limit.
A `..._problem` function takes a value and returns what is wrong with it, as the rest of a sentence that begins with
the field's name; None if nothing is.
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv6Address
from typing import Any, NamedTuple

from hookline.errors import Invalid

MIN_SECRET, MAX_SECRET = 16, 1024  # characters; from Python a shorter one is taken, with a warning
MIN_KEY, MAX_KEY = 24, 64  # bytes of the key of a `whsec_` secret (Standard Webhooks 1.0.0)
MAX_URL = 2083  # characters
MAX_EVENTS = 1000  # event types of one webhook
MIN_RATE, MAX_RATE = 0.0001, 10_000.0  # deliveries per second of one webhook: one in three hours at least
MAX_NAME = 200  # characters of an event type or a team: three names fit into an index of PostgreSQL
MAX_DESCRIPTION = 1000  # characters
MAX_HEADERS, MAX_HEADER_VALUE = 20, 4096  # headers of one webhook; characters of a value
MAX_RETRIES = 50  # steps of a retry schedule
MIN_WAIT, MAX_WAIT = 0.1, 30 * 86400.0  # seconds before a retry
MAX_OVERLAP = 30 * 86400  # seconds that the old secret keeps signing
MASK = "***"  # shown instead of a secret

ORIGIN = re.compile(
    r"https?://([^/?#\\]*@)?(\[[^/?#\\@\]]+\]|[^/?#\\@:\[\]]+)(?::([0-9]{1,5}))?(?![^/?#])", re.IGNORECASE
)
NOT_IN_A_URL = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
OWN_HEADERS = re.compile(r"(?i)webhook-.*|x-webhook-.*|content-length|content-type|host|transfer-encoding|connection")


class Registration(NamedTuple):
    """A webhook to be stored."""

    url: str
    events: Sequence[str]
    secret: str
    team: str | None = None
    description: str | None = None
    headers: Mapping[str, str] | None = None


def generate_secret() -> str:
    """Make a secret: `whsec_` and the base64 of 32 random bytes (Standard Webhooks 1.0.0)."""
    return "whsec_" + base64.b64encode(os.urandom(32)).decode()


def check(fields: Mapping[str, Any]) -> None:
    """Check the fields of a whole registration, or only those that change.

    Raises Invalid with the name of the field; no message holds a secret.
    """
    for name, value in fields.items():
        problem_of = PROBLEMS.get(name)
        if problem_of is None:
            raise Invalid(f"{name} is not a field of a webhook that can be set")
        if (problem := problem_of(value)) is not None:
            raise Invalid(f"{name} {problem}")


def check_changes(fields: Mapping[str, Any]) -> None:
    """Check changes of a stored webhook. Its secret cannot be one of them. Raises Invalid."""
    if "secret" in fields:
        raise Invalid("secret cannot be changed: rotate it, so that the old one can stay valid for a while")
    check(fields)


def check_rotation(secret: str, overlap_seconds: int) -> None:
    """Check a new secret and how many seconds the old one stays valid. Raises Invalid."""
    check({"secret": secret})
    if not is_number(overlap_seconds) or not 0 <= overlap_seconds <= MAX_OVERLAP:
        raise Invalid(f"overlap_seconds must be a number from 0 to {MAX_OVERLAP}")


def url_problem(url: Any) -> str | None:
    if (problem := url_shape_problem(url)) is not None:
        return problem
    if len(url) > MAX_URL:
        return f"must not be longer than {MAX_URL} characters"
    if "@" in url and ORIGIN.match(url)[1]:  # type: ignore[index]  # it has matched before
        return "must not have a user name or password: everyone who lists webhooks would see it; use headers"
    return None


def url_shape_problem(url: Any) -> str | None:
    """Check a URL without limits: an import may have URLs that are longer or have passwords."""
    match = ORIGIN.match(url) if isinstance(url, str) else None
    if match is None:
        if not isinstance(url, str) or not url.lower().startswith(("http://", "https://")):
            return "must start with http:// or https://"
        return "must have a host, and only a port number may follow its colon"
    if not (url.isascii() and url.isprintable() and " " not in url) and NOT_IN_A_URL.search(url):
        return text_problem(url) or "must not contain spaces or control characters"
    host, port = match[2], match[3]
    if host[0] == "[" and not is_ipv6(host[1:-1]):
        return "has something other than an IPv6 address in its brackets"
    if port and int(port) > 65535:
        return "must have a port from 0 to 65535"
    return None


def host_of(url: str) -> str:
    """Return the host of a URL in lower case; empty if it has none, as may be in a table that was adopted."""
    match = ORIGIN.match(url)
    return match[2].lower() if match else ""


def is_ipv6(text: str) -> bool:
    try:
        return bool(IPv6Address(text))
    except ValueError:
        return False


def events_problem(events: Any) -> str | None:
    if isinstance(events, str) or not isinstance(events, Sequence) or len(events) > MAX_EVENTS:
        return f"must be a list of at most {MAX_EVENTS} event types"
    for event in events:
        if (problem := name_problem(event)) is not None:
            return problem
    return None


def team_problem(team: Any) -> str | None:
    return None if team is None else name_problem(team)


def name_problem(name: Any) -> str | None:
    if not isinstance(name, str):
        return "must be text"
    if len(name) > MAX_NAME:
        return f"must not be longer than {MAX_NAME} characters"
    return text_problem(name)


def description_problem(description: Any) -> str | None:
    if description is None:
        return None
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION:
        return f"must be text of at most {MAX_DESCRIPTION} characters"
    return text_problem(description)


def secret_problem(secret: Any) -> str | None:
    """Check that a secret can sign. For HTTP `web/schemas.py` asks for more."""
    if not isinstance(secret, str) or not 1 <= len(secret) <= MAX_SECRET:
        return f"must be text of 1 to {MAX_SECRET} characters"
    if secret.startswith("whsec_") and not decoded_key(secret):
        return "starts with whsec_ but the rest is not base64"
    return text_problem(secret)


def key_problem(secret: str) -> str | None:
    """Check that the key of a `whsec_` secret has the length that Standard Webhooks asks for."""
    if not secret.startswith("whsec_") or MIN_KEY <= len(decoded_key(secret)) <= MAX_KEY:
        return None
    return f"starts with whsec_ but the rest is not the base64 of {MIN_KEY} to {MAX_KEY} bytes"


def decoded_key(secret: str) -> bytes:
    """Return the key of a `whsec_` secret, empty if it is not base64."""
    encoded = secret.removeprefix("whsec_")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        return b""


def headers_problem(headers: Any) -> str | None:
    if headers is None:
        return None
    if not isinstance(headers, Mapping) or len(headers) > MAX_HEADERS:
        return f"must be at most {MAX_HEADERS} names with their values"
    for name, value in headers.items():
        if not isinstance(name, str) or not HEADER_NAME.fullmatch(name) or OWN_HEADERS.fullmatch(name):
            return "must have names that HTTP allows, and none that Hookline sets itself"
        if not isinstance(value, str) or len(value) > MAX_HEADER_VALUE or not (value.isascii() and value.isprintable()):
            return f"must have printable ASCII of at most {MAX_HEADER_VALUE} characters as values"
    return None


def boolean_problem(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def schedule_problem(schedule: Any) -> str | None:
    if schedule is None:
        return None
    if not isinstance(schedule, list | tuple) or not 1 <= len(schedule) <= MAX_RETRIES:
        return f"must be a list of 1 to {MAX_RETRIES} numbers of seconds"
    if not all(is_number(wait) and MIN_WAIT <= wait <= MAX_WAIT for wait in schedule):
        return f"must have numbers from {MIN_WAIT} to {MAX_WAIT:.0f} seconds"
    return None


def rate_problem(rate_limit: Any) -> str | None:
    if rate_limit is None or (is_number(rate_limit) and MIN_RATE <= rate_limit <= MAX_RATE):
        return None
    return f"must be from {MIN_RATE} to {MAX_RATE:.0f} deliveries per second"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text_problem(text: str) -> str | None:
    """Check that both databases store a text, and store the same."""
    if "\0" in text:
        return "must not contain NUL characters"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return "must not contain lone surrogates"
    return None


PROBLEMS: dict[str, Callable[[Any], str | None]] = {  # by field
    "url": url_problem,
    "events": events_problem,
    "secret": secret_problem,
    "team": team_problem,
    "description": description_problem,
    "headers": headers_problem,
    "enabled": boolean_problem,
    "retry_schedule": schedule_problem,
    "rate_limit": rate_problem,
    "ordered": boolean_problem,
}
