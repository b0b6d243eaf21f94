"""Who may call: API keys, loopback without keys, or everyone where that is asked for; and what no caller may change."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health", "/ready")
READING = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
SIGNATURES = frozenset([b"webhook-signature", b"x-webhook-signature"])
PROXY_HEADERS = frozenset([b"forwarded", b"x-real-ip", b"via"])  # and all that begin with x-forwarded-
OTHER_SITES = (b"cross-site", b"same-site")  # another port of this machine is the same site, but not ours
DEFAULT_PORTS = {"http": ":80", "https": ":443"}

DELIVERED = (
    "A webhook's delivery may change nothing here, and this request carries a webhook-signature: "
    "give the webhook the URL of another service"
)
FOREIGN = (
    "A web page of another origin may change nothing here: the browser's Origin must be the scheme, host and port of "
    "this service (behind a proxy that ends TLS, set TRUSTED_PROXIES)"
)
KEY_WANTED = "An API key is required: send the header  Authorization: Bearer KEY  with one of API_KEYS"
PROXIED = (
    "A request that came through a proxy is not served while API_KEYS is not set: "
    "set API_KEYS, or ALLOW_ANONYMOUS=true to serve everyone"
)
ONLY_LOOPBACK = (
    "Only requests from this machine, to a loopback host name, are served while API_KEYS is not set: "
    "set API_KEYS, or ALLOW_ANONYMOUS=true to serve everyone"
)

Headers = Mapping[bytes, bytes]


class Access:
    """ASGI middleware that answers 401, 403 or 508 itself."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], allow_anonymous: bool) -> None:
        self.app = app
        self.keys = [key.encode() for key in api_keys]
        self.allow_anonymous = allow_anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if scope["method"] not in READING:  # whatever keys it has
            if not SIGNATURES.isdisjoint(headers):
                return refused(508, DELIVERED)
            if is_foreign(scope, headers):
                return refused(403, FOREIGN)
        if scope["path"] in OPEN_PATHS:
            return None
        if self.keys:
            return None if self.has_key(text(headers, b"authorization")) else refused(401, KEY_WANTED)
        if self.allow_anonymous:
            return None
        if came_through_a_proxy(headers):
            return refused(403, PROXIED)
        if not (is_loopback(scope) and is_loopback_name(text(headers, b"host"))):
            return refused(403, ONLY_LOOPBACK)
        return None

    def has_key(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        token = given.strip().encode()
        # No short cut: every key is compared, each in constant time.
        matches = [hmac.compare_digest(token, key) for key in self.keys]
        return scheme.lower() == "bearer" and any(matches)


def refused(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)


def text(headers: Headers, name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


def is_foreign(scope: Scope, headers: Headers) -> bool:
    """Did a page of another origin send this? Browsers say so in one of two headers; other clients send neither."""
    if headers.get(b"sec-fetch-site") in OTHER_SITES:
        return True
    if b"origin" not in headers:
        return False
    scheme = scope.get("scheme", "http")
    host = text(headers, b"host").removesuffix(DEFAULT_PORTS.get(scheme, ""))
    return text(headers, b"origin").lower() != f"{scheme}://{host}".lower()


def came_through_a_proxy(headers: Headers) -> bool:
    # Each request comes here, and a loop over the names would cost six times as much.
    return not PROXY_HEADERS.isdisjoint(headers) or b"\nx-forwarded-" in b"\n".join([b"", *headers])


def is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback_name(client[0])


@lru_cache(maxsize=256)
def is_loopback_name(host: str) -> bool:
    """A page of another site can reach this machine under its own name (DNS rebinding), but not under these."""
    name = re.sub(r":\d+$", "", host) if host.startswith("[") or host.count(":") == 1 else host
    name = name.strip("[]").removesuffix(".").lower()
    try:
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
