"""Warnings about a registration: reasons why it will get nothing that can be told before any delivery."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network

from hookline.egress.guard import Network, literal_refusal
from hookline.registration import host_of

NO_EVENTS = "it will get no events: its list of events is empty"
LOCAL_NAME = "names in .local are of private addresses, and ALLOWED_NETWORKS has none"
PRIVATE_NETWORKS = [  # RFC 1918, RFC 4193, RFC 3927, RFC 4291
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "169.254.0.0/16", "fe80::/10")
]


def warnings_of(url: str, events: Sequence[str], allowed: Sequence[Network]) -> list[str]:
    """Return a sentence for each reason. `allowed`: the networks that the egress guard lets through."""
    warnings = [] if events else [NO_EVENTS]
    undeliverable = url_warning(url, allowed)
    return [*warnings, undeliverable] if undeliverable else warnings


def url_warning(url: str, allowed: Sequence[Network]) -> str | None:
    """Return why nothing will be delivered to a URL; None if that shows only once its name is looked up."""
    reason = literal_refusal(url, allowed)
    if reason is None and is_local_name(url) and not any(is_private(network) for network in allowed):
        reason = LOCAL_NAME
    return f"it will not be delivered to: {reason}" if reason else None


def is_local_name(url: str) -> bool:
    """Tell whether a URL's host is a name of multicast DNS (RFC 6762)."""
    return host_of(url).rstrip(".").endswith(".local")


def is_private(network: Network) -> bool:
    """Tell whether a network has private addresses."""
    return any(network.version == private.version and network.overlaps(private) for private in PRIVATE_NETWORKS)
