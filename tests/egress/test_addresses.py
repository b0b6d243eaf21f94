"""The tables of addresses and ports, at the edges of every range."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from hookline.egress.addresses import BAD_PORTS, is_public, with_embedded
from hookline.egress.guard import literal_refusal, port_refusal, refusal

REFUSED = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
    192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15
    198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
    ::/96 ::/3 ::ffff:0:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 200::/7
    2001::/32 2001:1::1/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28 2001::/23
    2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20
    4000::/3 4000::/2 5f00::/16 6000::/3 8000::/1 c000::/3 e000::/4 f000::/5 f800::/6 fc00::/7 fe00::/9 fe80::/10
    fec0::/10 ff00::/8
"""
PUBLIC = """
    1.0.0.0 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
    168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0
    192.0.1.255 192.0.3.0 192.31.195.255 192.31.197.0 192.52.192.255 192.52.194.0 192.88.98.255 192.88.100.0
    192.167.255.255 192.169.0.0 192.175.47.255 192.175.49.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0
    203.0.112.255 203.0.114.0 223.255.255.255
    2000:: 2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2001:200:: 2001:db7:ffff:ffff:ffff:ffff:ffff:ffff 2001:db9::
    2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2003:: 2606:4700::1111 2620:4f:7fff:ffff:ffff:ffff:ffff:ffff
    2620:4f:8001:: 2001:4860:4860::8888 3ffe:: 3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff 3fff:1000::
    3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""


@pytest.mark.parametrize("network", REFUSED.split())
def test_the_first_middle_and_last_address_of_a_special_range_are_refused(network: str) -> None:
    special = ip_network(network)
    for ip in (special[0], special[special.num_addresses // 2], special[-1]):
        if ip not in ip_network("::ffff:0:0/96"):
            assert not is_public(ip), ip
        assert refusal(str(ip), []) == f"{ip} is not a public address: to allow it, add its network to ALLOWED_NETWORKS"
        assert refusal(str(ip), [special, ip_network("0.0.0.0/0")]) is None


@pytest.mark.parametrize("address", PUBLIC.split())
def test_the_neighbours_of_special_ranges_are_public(address: str) -> None:
    assert is_public(ip_address(address))
    assert refusal(address, []) is None
    if ":" not in address:
        assert refusal(f"::ffff:{address}", []) is None


def test_no_answer_of_the_python_that_runs_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (IPv4Address, IPv6Address):
        for name in ("is_global", "is_private", "is_reserved", "is_multicast", "is_link_local", "is_site_local"):
            if hasattr(kind, name):
                monkeypatch.delattr(kind, name)
    assert refusal("192.0.0.64", []) is not None
    assert refusal("192.0.0.9", []) is not None
    assert refusal("8.8.8.8", []) is None


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("10.0.0.1", ["10.0.0.1"]),
        ("::", ["::"]),
        ("::1", ["::1"]),
        ("::ffff:10.0.0.1", ["10.0.0.1"]),
        ("::10.0.0.1", ["::a00:1", "10.0.0.1"]),
        ("::ffff:0:10.0.0.1", ["::ffff:0:a00:1", "10.0.0.1"]),
        ("64:ff9b::10.0.0.1", ["64:ff9b::a00:1", "10.0.0.1"]),
        ("2002:a00:1::5", ["2002:a00:1::5", "10.0.0.1"]),
        ("2001:0:a00:1::f5ff:fffd", ["2001:0:a00:1::f5ff:fffd", "10.0.0.1", "10.0.0.2"]),
        ("2606:4700::1111", ["2606:4700::1111"]),
    ],
)
def test_an_address_embeds_the_ipv4_addresses_that_routers_would_go_on_to(address: str, reached: list[str]) -> None:
    assert [str(ip) for ip in with_embedded(ip_address(address))] == reached


@pytest.mark.parametrize(
    "address", ["::10.0.0.1", "::ffff:0:10.0.0.1", "64:ff9b::10.0.0.1", "2002:a00:1::5", "2001:0:a00:1::f5ff:fffd"]
)
def test_all_of_ipv6_allowed_is_no_way_to_a_private_ipv4_address(address: str) -> None:
    everything = ip_network("::/0")
    assert (refusal(address, [everything]) or "").startswith("10.0.0.1 is not a public address")
    assert refusal(address, [everything, ip_network("10.0.0.0/8")]) is None


def test_there_are_83_bad_ports() -> None:
    assert len(BAD_PORTS) == 83
    assert {1, 7, 9, 22, 25, 110, 6000, 6667, 10080} < BAD_PORTS
    assert not BAD_PORTS & {80, 443, 3000, 5000, 8000, 8005, 8006, 8080, 8123, 8443}


def test_a_bad_port_is_open_in_an_allowed_network_alone() -> None:
    home = [ip_network("192.168.0.0/16")]
    sentence = "port 25 is blocked: to allow it, add the address's network to ALLOWED_NETWORKS"
    assert port_refusal("8.8.8.8", 25, home) == sentence
    assert port_refusal("192.168.1.5", 25, home) is None
    assert port_refusal("::ffff:192.168.1.5", 25, home) is None
    assert port_refusal("8.8.8.8", 8080, home) is None
    assert literal_refusal("https://8.8.8.8:25/", home) == sentence
    assert literal_refusal("https://192.168.1.5:25/", home) is None
    assert literal_refusal("https://example.com:25?x", []) == sentence
    assert literal_refusal("https://example.com:25", home) is None  # perhaps it leads there
    assert literal_refusal("https://example.com:8025", []) is None
