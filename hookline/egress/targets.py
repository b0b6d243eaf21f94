"""URLs as the client uses them: where to connect, and what the head of every request there begins with."""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

SAFE = "!$%&'()*+,-./:;=@_~?[]"  # of a path and a query, beside letters and digits; % begins what is encoded already
HOST = re.compile(r"[A-Za-z0-9._~-]+|[0-9A-Fa-f:.]+")  # a name or an address of IPv6

MISLEADING = re.compile(r"[\t\r\n\\]")  # urlsplit drops some of these, and browsers read a backslash as a slash


class Origin(NamedTuple):
    is_tls: bool
    host: str  # ASCII, lower case, without brackets
    port: int


class Target(NamedTuple):
    origin: Origin
    head: str  # the request line, Host, and Authorization if the URL has a password


@lru_cache(maxsize=10_000)
def target_of(url: str) -> Target:
    """Raises ValueError if it is no URL of HTTP; the exception's text is not for users: it may hold a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or MISLEADING.search(url.partition("?")[0]):
        raise ValueError("not a URL of HTTP")
    host = ascii_host(parts.hostname)
    default = 443 if parts.scheme == "https" else 80
    port = default if parts.port is None else parts.port
    path = quote(parts.path or "/", safe=SAFE) + (f"?{quote(parts.query, safe=SAFE)}" if parts.query else "")
    shown = f"[{host}]" if ":" in host else host
    lines = [f"POST {path} HTTP/1.1", f"Host: {shown}" if port == default else f"Host: {shown}:{port}"]
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        lines.append(f"Authorization: Basic {base64.b64encode(user.encode()).decode()}")
    return Target(Origin(parts.scheme == "https", host, port), "\r\n".join(lines) + "\r\n")


def ascii_host(host: str) -> str:
    """The host as DNS has it (IDNA 2008 with UTS 46). Raises ValueError."""
    if host.isascii():
        if not HOST.fullmatch(host):
            raise ValueError("not a host")
        return host.lower()
    import idna  # few URLs need it

    try:
        return idna.encode(host, uts46=True).decode()
    except idna.IDNAError as exc:
        raise ValueError("not a host") from exc
