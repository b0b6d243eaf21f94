"""Access control: API keys; without keys only this machine, or everyone where the operator asks for it.

A change is refused, whatever keys a request has, if a page of another origin or a webhook's delivery asks for it.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health", "/ready")
READ_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing
SIGNATURE_HEADERS = frozenset([b"webhook-signature", b"x-webhook-signature"])
PROXY_HEADERS = frozenset([b"forwarded", b"x-real-ip", b"via"])  # and all that begin with x-forwarded-
OTHER_SITES = (b"cross-site", b"same-site")  # another port of this machine is "same-site", and not ours
DEFAULT_PORTS = {"http": ":80", "https": ":443"}

DELIVERED = (
    "A delivery of a webhook may change nothing here, and this request has the header webhook-signature: "
    "change the URL of the webhook to that of another service"
)
FOREIGN_ORIGIN = (
    "A web page of another origin may change nothing here: the browser's Origin must be the scheme, host and port of "
    "this service (behind a proxy that ends TLS, set TRUSTED_PROXIES)"
)
KEY_REQUIRED = "An API key is required: send the header  Authorization: Bearer KEY  with one of API_KEYS"
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
    """ASGI middleware that answers 401, 403 or 508 to a request that may not pass."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], allow_anonymous: bool) -> None:
        self.app = app
        self.keys = [key.encode() for key in api_keys]
        self.allow_anonymous = allow_anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, scope: Scope) -> JSONResponse | None:
        """Return the answer to a request that is refused, None if it is let through."""
        headers = dict(scope["headers"])
        if scope["method"] not in READ_METHODS:
            if not SIGNATURE_HEADERS.isdisjoint(headers):
                return answer(508, DELIVERED)
            if is_foreign(scope, headers):
                return answer(403, FOREIGN_ORIGIN)
        if scope["path"] in OPEN_PATHS:
            return None
        if self.keys:
            return None if self.has_key(text(headers, b"authorization")) else answer(401, KEY_REQUIRED)
        if self.allow_anonymous:
            return None
        if came_through_a_proxy(headers):
            return answer(403, PROXIED)
        if not (is_loopback(scope) and is_loopback_name(text(headers, b"host"))):
            return answer(403, ONLY_LOOPBACK)
        return None

    def has_key(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        sent = token.strip().encode()
        matches = [hmac.compare_digest(sent, key) for key in self.keys]  # all of them, so that timing tells nothing
        return scheme.lower() == "bearer" and any(matches)


def answer(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)


def text(headers: Headers, name: bytes) -> str:
    return headers.get(name, b"").decode("latin-1")


def is_foreign(scope: Scope, headers: Headers) -> bool:
    """Tell whether a page of another origin sent this. Browsers say so in two headers, other clients send neither."""
    if headers.get(b"sec-fetch-site") in OTHER_SITES:
        return True
    if b"origin" not in headers:
        return False
    scheme = scope.get("scheme", "http")
    host = text(headers, b"host").removesuffix(DEFAULT_PORTS.get(scheme, ""))
    return text(headers, b"origin").lower() != f"{scheme}://{host}".lower()


def came_through_a_proxy(headers: Headers) -> bool:
    # Every request comes here: one search in the joined names costs a sixth of a loop over them.
    return not PROXY_HEADERS.isdisjoint(headers) or b"\nx-forwarded-" in b"\n".join([b"", *headers])


def is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback_name(client[0])


@lru_cache(maxsize=256)
def is_loopback_name(host: str) -> bool:
    """Tell whether a host name can only mean this machine. Other names may be a foreign page's (DNS rebinding)."""
    name = re.sub(r":\d+$", "", host) if host.startswith("[") or host.count(":") == 1 else host
    name = name.strip("[]").removesuffix(".").lower()
    try:
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
