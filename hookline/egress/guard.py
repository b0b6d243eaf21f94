"""The guard: deliveries connect to public addresses and to those allowed, no others.

The client asks it about an address right before a socket connects to it. So it sees literals in every spelling, and
each DNS answer as it is used: no other answer can take its place in between (DNS rebinding).

An attempt records no address of a name that was refused: customers would learn the addresses behind the operator's
internal names. The operator's log has them.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hookline.egress.addresses import BAD_PORTS, Address, is_public, with_embedded

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Listening = tuple[str, int]  # host and port

HOST = re.compile(r"(?i)https?://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/?#:]*)(?::([0-9]{1,5})(?![^/?#]))?")
TO_ALLOW = "to allow it, add its network to ALLOWED_NETWORKS"
NAME_REFUSED = (
    "the endpoint's name resolves to something that is not a public address: to allow it, the operator adds its "
    "network to ALLOWED_NETWORKS"
)
OWN_REFUSED = "this service listens there: it does not deliver to itself"

log = logging.getLogger("hookline")


def refusal(address: str, allowed: Sequence[Network]) -> str | None:
    """Return why the guard refuses an address, in a sentence that names the setting; None if it lets it through."""
    for ip in with_embedded(ip_of(address)):
        if not is_public(ip) and not is_allowed(ip, allowed):
            return f"{ip} is not a public address: {TO_ALLOW}"
    return None


def port_refusal(address: str, port: int, allowed: Sequence[Network]) -> str | None:
    """Return why the guard refuses a port that no endpoint has; None if the port or the address is allowed."""
    if port not in BAD_PORTS or all(is_allowed(ip, allowed) for ip in with_embedded(ip_of(address))):
        return None
    return port_sentence(port)


def port_sentence(port: int) -> str:
    return f"port {port} is blocked: to allow it, add the address's network to ALLOWED_NETWORKS"


def ip_of(address: str) -> Address:
    return ipaddress.ip_address(address.partition("%")[0])


def is_allowed(ip: Address, allowed: Sequence[Network]) -> bool:
    return any(ip in network for network in allowed if network.version == ip.version)


def literal_refusal(url: str, allowed: Sequence[Network]) -> str | None:
    """Return why the guard refuses a URL whose host is an address, or a name that always means this machine.

    None if it lets it through, and for any other name: of these only the port can be judged before the look-up, and
    only if no network is allowed.
    """
    match = HOST.match(url)
    if match is None:
        return None
    host = unicodedata.normalize("NFKC", match[1]).replace("\u3002", ".")  # as names are read: full-width digits, dots
    return literal_host_refusal(host.lower(), int(match[2] or 80), tuple(allowed))


@lru_cache(maxsize=10_000)
def literal_host_refusal(host: str, port: int, allowed: tuple[Network, ...]) -> str | None:
    host = host.strip("[]").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"
    try:
        ip_of(host)
    except ValueError:
        try:
            host = socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f.1, 2130706433
        except (OSError, ValueError):
            return port_sentence(port) if port in BAD_PORTS and not allowed else None
    return refusal(host, allowed) or port_refusal(host, port, allowed)


def leads_here(address: tuple[Any, ...], own: Listening | None) -> bool:
    """Tell whether a socket that connects to this address reaches the one on which this process listens."""
    if own is None or address[1] != own[1]:
        return False
    reached = with_embedded(ip_of(address[0]))
    if any(ip.is_loopback or ip.is_unspecified for ip in reached):
        return True
    try:
        bound = ip_of(own[0])
    except ValueError:  # a name: it may be any address of this machine
        bound = ipaddress.IPv4Address(0)
    if not bound.is_unspecified:
        return bound in reached
    return is_local(address[0]) or any(is_local(str(ip)) for ip in reached)


def is_local(address: str) -> bool:
    """Tell whether this is an address of this machine, by binding a socket to it."""
    try:
        infos = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        family, kind, _, _, socket_address = infos[0]
        with socket.socket(family, kind) as probe:
            probe.bind(socket_address)
            return True
    except OSError:
        return False
