"""Tables of public addresses and of ports. They are our own: `ipaddress.is_global` differs between Python patch levels.

Sources: IANA's special-purpose address registries for IPv4 and IPv6 (RFC 6890). All of their networks are refused, the
"globally reachable" ones too: an anycast service of the network itself is nobody's endpoint. The ports are the
"bad ports" of the Fetch standard (https://fetch.spec.whatwg.org/#port-blocking): protocols that a POST could talk to.
"""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

SPECIAL_IPV4 = [
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # "this network"
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by a carrier's customers (RFC 6598)
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's services for the machine itself; in no registry
        "169.254.0.0/16",  # link-local, and most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # IETF protocol assignments, and one cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
]
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
SPECIAL_IPV6 = [  # of the global unicast addresses; everything else is refused
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, AMT, AS112, ORCHID, drones
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]

MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")  # the socket connects to the IPv4 address itself
EMBEDDING = [  # a network, and the number of bits behind the IPv4 address to which a router would forward
    (ipaddress.IPv6Network("::/96"), 0),  # IPv4-compatible (RFC 4291)
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),  # SIIT (RFC 2765)
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64 (RFC 6052)
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4 (RFC 3056)
    (ipaddress.IPv6Network("2001::/32"), 64),  # Teredo (RFC 4380): its server
]
TEREDO = EMBEDDING[-1][0]
LAST_32 = 0xFFFFFFFF

# fmt: off
BAD_PORTS = frozenset((
    0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104,
    109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515,
    526, 530, 531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049,
    3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080,
))
# fmt: on


def is_public(ip: Address) -> bool:
    """Tell whether this is an ordinary address of the internet, whatever addresses it embeds."""
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in SPECIAL_IPV4)
    return ip in GLOBAL_UNICAST and not any(ip in network for network in SPECIAL_IPV6)


def with_embedded(ip: Address) -> list[Address]:
    """Return the addresses that a connection to this one may reach: itself, and the IPv4 addresses that it embeds."""
    if isinstance(ip, ipaddress.IPv4Address):
        return [ip]
    number = int(ip)
    if ip in MAPPED:
        return [ipaddress.IPv4Address(number & LAST_32)]
    reached: list[Address] = [ip]
    if number > 1:  # :: and ::1 are no IPv4 addresses
        reached += [ipaddress.IPv4Address(number >> bits & LAST_32) for network, bits in EMBEDDING if ip in network]
    if ip in TEREDO:
        reached.append(ipaddress.IPv4Address(~number & LAST_32))
    return reached
