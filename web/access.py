"""Who may call: API keys, loopback without keys, or everyone where that is asked for."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health", "/ready")
ONLY_LOOPBACK = (
    "Only requests from this machine, to a loopback host name, are served while API_KEYS is not set: "
    "set API_KEYS, or ALLOW_ANONYMOUS=true to serve everyone"
)


class Access:
    """ASGI middleware that answers 401 or 403 itself."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], allow_anonymous: bool) -> None:
        self.app = app
        self.keys = [key.encode() for key in api_keys]
        self.allow_anonymous = allow_anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["path"] in OPEN_PATHS or (self.allow_anonymous and not self.keys):
            return None
        if self.keys:
            if self.has_key(header(scope, b"authorization")):
                return None
            detail = "An API key is required: send the header  Authorization: Bearer KEY"
            return JSONResponse({"detail": detail}, 401, {"WWW-Authenticate": "Bearer"})
        if is_loopback(scope) and is_loopback_name(header(scope, b"host")):
            return None
        return JSONResponse({"detail": ONLY_LOOPBACK}, 403)

    def has_key(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        token = given.strip().encode()
        # No short cut: every key is compared, each in constant time.
        matches = [hmac.compare_digest(token, key) for key in self.keys]
        return scheme.lower() == "bearer" and any(matches)


def header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback_name(client[0])


@lru_cache(maxsize=256)
def is_loopback_name(host: str) -> bool:
    """A page of another site can reach this machine under its own name (DNS rebinding), but not under these."""
    name = re.sub(r":\d+$", "", host) if host.startswith("[") or host.count(":") == 1 else host
    name = name.strip("[]").lower()
    try:
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
