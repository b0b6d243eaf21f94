"""The guard as tables of addresses, and the client against real servers that misbehave."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from hookline.egress.client import Client, connect_reason, retry_after
from hookline.egress.connection import KEPT, LONG_HEAD, MANY_HEADERS, MANY_INTERIM, SWITCHING
from hookline.egress.guard import NAME_REFUSED, literal_refusal, refusal
from hookline.egress.names import Names
from hookline.policy import Result
from tests.databases import free_port
from tests.egress.serving import Handler, serving

NOW = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
LOOPBACK = ip_network("127.0.0.0/8")
BODY = b'{"event":"game_started"}'
TIMEOUT = 0.5


# The guard


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.0.0.1",
        "10.0.0.1",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:192.168.1.1",
        "::ffff:0.0.0.0",
        "::ffff:168.63.129.16",
        "64:ff9b::7f00:1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::1",
        "64:ff9b:1::10.0.0.1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2002:808:808::1",
        "3fff::1",
        "3fff:fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_the_guard_refuses_what_is_not_public(address: str) -> None:
    sentence = refusal(address, [])
    assert sentence is not None
    assert sentence.endswith(" is not a public address: to allow it, add its network to ALLOWED_NETWORKS")


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "172.15.255.255",
        "172.32.0.1",
        "100.63.255.255",
        "100.128.0.1",
        "168.63.129.17",
        "192.88.98.1",
        "192.88.100.1",
        "223.255.255.255",
        "2606:4700::1111",
        "2001:4860:4860::8888",
        "::ffff:8.8.8.8",
    ],
)
def test_the_guard_lets_public_addresses_through(address: str) -> None:
    assert refusal(address, []) is None


@pytest.mark.parametrize(
    ("address", "allowed", "through"),
    [
        ("10.1.2.3", ["10.0.0.0/8"], True),
        ("11.0.0.1", ["10.0.0.0/8"], True),  # public anyway
        ("10.1.2.3", ["10.1.2.0/30"], True),
        ("10.1.2.4", ["10.1.2.0/30"], False),
        ("10.1.2.3", ["192.168.0.0/16", "10.0.0.0/8"], True),
        ("127.0.0.1", ["127.0.0.1/32"], True),
        ("127.0.0.2", ["127.0.0.1/32"], False),
        ("168.63.129.16", ["168.63.129.16/32"], True),
        ("::ffff:10.1.2.3", ["10.0.0.0/8"], True),
        ("::ffff:10.1.2.3", ["::/0"], False),  # it is the IPv4 address that counts
        ("::1", ["127.0.0.0/8"], False),
        ("::1", ["0.0.0.0/0"], False),
        ("::1", ["::1/128"], True),
        ("127.0.0.1", ["::/0"], False),
        ("fd00::5", ["fd00::/8"], True),
        ("fe80::1%eth0", ["fe80::/10"], True),
        ("64:ff9b::8.8.8.8", ["64:ff9b::/96"], True),
        ("64:ff9b::10.0.0.1", ["64:ff9b::/96"], False),  # a way in, although the gateway is allowed
        ("64:ff9b::10.0.0.1", ["64:ff9b::/96", "10.0.0.0/8"], True),
        ("64:ff9b::10.0.0.1", ["10.0.0.0/8"], False),
        ("2002:a00:1::1", ["2002::/16"], False),
        ("2002:a00:1::1", ["2002::/16", "10.0.0.0/8"], True),
    ],
)
def test_allowed_networks_open_exactly_what_they_name(address: str, allowed: list[str], through: bool) -> None:
    assert (refusal(address, [ip_network(network) for network in allowed]) is None) is through


def test_the_sentence_names_the_address_and_the_setting() -> None:
    expected = "10.0.0.1 is not a public address: to allow it, add its network to ALLOWED_NETWORKS"
    assert refusal("10.0.0.1", []) == expected
    assert refusal("::ffff:10.0.0.1", [LOOPBACK]) == expected


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "0x7f.1",
        "0x7f000001",
        "0177.0.0.1",
        "017700000001",
        "2130706433",
        "127.0.0.1.",
        "localhost",
        "LocalHost",
        "localhost.",
        "hooks.localhost",
        "[::ffff:127.0.0.1]",
        "[::FFFF:7F00:1]",
    ],
)
def test_every_spelling_of_loopback_is_refused_in_a_url(host: str) -> None:
    for url in (f"http://{host}", f"https://{host}:8443/hook?a=b#c", f"HTTP://user:password@{host}/"):
        sentence = literal_refusal(url, [])
        assert sentence is not None and sentence.startswith("127.0.0.1 is not a public address")
        assert literal_refusal(url, [LOOPBACK]) is None


@pytest.mark.parametrize(
    ("host", "refused"), [("[::1]", "::1"), ("[::]", "::"), ("[fe80::1%25eth0]", "fe80::1"), ("0", "0.0.0.0")]
)
def test_other_addresses_of_this_machine_are_refused_in_a_url(host: str, refused: str) -> None:
    assert (literal_refusal(f"http://{host}:80/", []) or "").startswith(f"{refused} is not a public address")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook",
        "http://localhost.example.com",
        "http://notlocalhost/",
        "http://8.8.8.8/",
        "http://[2606:4700::1111]/",
        "http://10.0.0.1.example.com/",
        "http://example.com/?next=http://127.0.0.1/",
        "http://example.com#@127.0.0.1",
        "http://127.0.0.1:80@example.com/",
        "http:///path",
        "ftp://127.0.0.1/",
        "nonsense",
        "",
    ],
)
def test_an_ordinary_host_name_gets_no_opinion_before_it_is_looked_up(url: str) -> None:
    assert literal_refusal(url, []) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("0", 0),
        ("120", 120),
        (" 120 ", 120),
        ("9" * 5000, 999_999_999_999),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(days=9), usegmt=True), 0),
        ("Mon, 23 Nov 2026 15:00:00 +0100", 0),
        ("Mon, 23 Nov 2026 14:30:10 -0000", 10),
        ("Monday, 23-Nov-26 14:31:00 GMT", 60),  # RFC 850
        ("Mon Nov 23 14:31:00 2026", 60),  # asctime
        ("", None),
        ("-5", None),
        ("+5", None),
        ("1.5", None),
        ("1e3", None),
        ("inf", None),
        ("nan", None),
        ("٣", None),
        ("²", None),
        ("soon", None),
        (",", None),
        ("Mon, 32 Nov 2026 14:30:00 GMT", None),
        ("Mon, 23 Nov 2026 99:30:00 GMT", None),
        ("2026-11-23T14:30:00Z", None),
        ("Mon, 23 Nov 99999999999999999999 14:30:00 GMT", None),  # its answer lost its status: a 410 was none
    ],
)
def test_retry_after_is_seconds_or_a_date_and_all_else_is_nothing(text: str | None, expected: float | None) -> None:
    assert retry_after(None if text is None else text.encode(), NOW) == expected


# The client, against real servers


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(len(BODY))


def answering(answer: bytes, requests: list[bytes] | None = None) -> Handler:
    """A handler that answers one request with these bytes, and closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = await request(reader)
        if requests is not None:
            requests.append(got)
        writer.write(answer)
        await writer.drain()

    return handle


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def started(client: Client) -> AsyncIterator[Client]:
    await client.start()
    yield client
    await client.close()


async def post(port: int, scheme: str = "http") -> Result:
    async with started(Client(allowed=[LOOPBACK], timeout=TIMEOUT)) as client:
        return await client.post(f"{scheme}://127.0.0.1:{port}/hook", BODY, {"X-Test": "yes"})


async def test_an_answer_is_recorded_with_its_body() -> None:
    requests: list[bytes] = []
    async with serving(answering(http("200 OK", "přijato ☃".encode()), requests)) as port:
        result = await post(port)
    assert (result.status_code, result.error, result.response) == (200, None, "přijato ☃")
    assert result.retry_after is None
    assert result.started_at.tzinfo is not None and 0 <= result.duration_ms < 5000
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /hook HTTP/1.1\r\n") and b"X-Test: yes" in head
    assert body == BODY


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (http("204 No Content"), ""),
        (http("200 OK", b"a\0b"), "a\ufffdb"),
        (http("200 OK", b"\xff"), "\ufffd"),
        (http("200 OK", b"x" * KEPT), "x" * KEPT),
        (http("200 OK", b"x" * (KEPT + 1)), "x" * KEPT),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", "until the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + http("200 OK", b"then"), "then"),
    ],
)
async def test_what_is_kept_of_an_answer_can_be_stored_as_text(answer: bytes, kept: str) -> None:
    async with serving(answering(answer)) as port:
        result = await post(port)
    assert (result.error, result.response) == (None, kept)


async def test_a_redirect_is_not_followed_and_is_an_error() -> None:
    requests: list[bytes] = []
    async with serving(answering(http("302 Found", b"", "Location: /elsewhere"), requests)) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (302, "answered 302: redirects are not followed")
    assert len(requests) == 1


@pytest.mark.parametrize("status", ["400 Bad Request", "410 Gone", "500 Internal Server Error"])
async def test_an_error_status_is_recorded_with_its_body(status: str) -> None:
    async with serving(answering(http(status, b"no"))) as port:
        result = await post(port)
    code = int(status[:3])
    assert (result.status_code, result.error, result.response) == (code, f"answered {code}", "no")


async def test_the_wait_that_an_endpoint_asks_for_is_recorded() -> None:
    async with serving(answering(http("429 Too Many Requests", b"", "Retry-After: 120"))) as port:
        assert (await post(port)).retry_after == 120


async def test_nobody_listens() -> None:
    result = await post(free_port())
    assert (result.status_code, result.error) == (None, "connection refused")


async def test_a_server_closes_without_an_answer() -> None:
    async with serving(answering(b"")) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (None, "the endpoint closed the connection without an answer")


async def test_a_server_resets_the_connection() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with serving(reset) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (None, "the endpoint reset the connection")


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nbegin"])
async def test_a_server_that_hangs_is_timed_out(first: bytes) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        await asyncio.Event().wait()

    async with serving(hang) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (None, "timed out after 0.5 s")
    assert 400 <= result.duration_ms < 5000


@pytest.mark.parametrize("at_once", [b"", http("200 OK", b"x" * 500)[:-499]], ids=["head", "body"])
async def test_dripping_bytes_do_not_stretch_the_time_out(at_once: bytes) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(at_once)
        for byte in http("200 OK", b"x" * 500).removeprefix(at_once):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)

    async with serving(drip) as port:
        start = time.monotonic()
        result = await post(port)
        took = time.monotonic() - start
    assert (result.status_code, result.error) == (None, "timed out after 0.5 s")
    assert took < 5


async def test_a_server_that_never_answers_tls_is_timed_out() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with serving(hang) as port:
        assert (await post(port, "https")).error == "timed out after 0.5 s"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/9.9 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: minus\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_said_to_be_not_http(garbage: bytes) -> None:
    async with serving(answering(garbage)) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (None, "the answer is not HTTP")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", LONG_HEAD),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, LONG_HEAD),
        (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 201 + b"\r\n", MANY_HEADERS),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 9 + http("200 OK"), MANY_INTERIM),
        ((b"HTTP/1.1 103 Early Hints\r\nX: " + b"x" * 9000 + b"\r\n\r\n") * 8 + http("200 OK"), LONG_HEAD),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", SWITCHING),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", SWITCHING),
        (http("999 No"), "answered 999, which is not a status of HTTP"),
        (http("099 No"), "answered 099, which is not a status of HTTP"),
    ],
)
async def test_an_answer_beyond_the_limits_is_refused_by_name(answer: bytes, error: str) -> None:
    async with serving(answering(answer)) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (None, error)


async def test_up_to_eight_interim_answers_are_passed_over() -> None:
    async with serving(answering(b"HTTP/1.1 103 Early Hints\r\nRetry-After: 9\r\n\r\n" * 8 + http("503 No"))) as port:
        result = await post(port)
    assert (result.status_code, result.retry_after) == (503, None)


async def test_a_cut_off_answer_is_a_failure() -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin")) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (None, "the answer was cut off")


@pytest.mark.parametrize("length", ["Content-Length: 50000000\r\n", ""], ids=["with-length", "until-the-end"])
async def test_50_megabytes_are_not_read(length: str) -> None:
    sent, over = 0, asyncio.Event()

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request(reader)
        writer.write(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
        try:
            while sent < 50_000_000:
                writer.write(b"x" * 50_000)
                await writer.drain()
                sent += 50_000
        finally:
            over.set()

    async with serving(pour) as port, started(Client(allowed=[LOOPBACK], timeout=10)) as client:
        result = await client.post(f"http://127.0.0.1:{port}/", BODY, {})
        await asyncio.wait_for(over.wait(), 10)
    assert (result.status_code, result.error, result.response) == (200, None, "x" * KEPT)
    assert sent < 25_000_000  # what fits into the sockets' buffers


@pytest.mark.parametrize("size", [100_000, 20_000_000], ids=["short", "long"])
async def test_a_gzip_bomb_is_not_inflated(size: int) -> None:
    bomb = gzip.compress(b"\0" * size, mtime=0)
    async with serving(answering(http("200 OK", bomb, "Content-Encoding: gzip"))) as port:
        result = await post(port)
    assert result.error is None
    assert result.response == bomb[:KEPT].decode(errors="replace").replace("\0", "\ufffd")


@pytest.fixture(scope="module")
def self_signed(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    make(key, certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def make(key: Path, certificate: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


async def test_a_certificate_that_does_not_verify_fails(self_signed: ssl.SSLContext) -> None:
    requests: list[bytes] = []
    async with serving(answering(http("200 OK"), requests), self_signed) as port:
        result = await post(port, "https")
    assert result.status_code is None
    assert (result.error or "").startswith("TLS failed: self") and "signed certificate" in (result.error or "")
    assert requests == []


async def test_a_server_that_does_not_speak_tls_fails() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(http("400 Bad Request"))

    async with serving(answer) as port:
        assert ((await post(port, "https")).error or "").startswith("TLS failed: ")


# Names


class Answers:
    """A `getaddrinfo` that resolves any name: to the next answer at each look-up."""

    def __init__(self, *answers: list[str] | OSError) -> None:
        self.answers = list(answers)

    def __call__(self, host: str, port: None, **options: Any) -> list[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return [socket.getaddrinfo(address, port, **options)[0] for address in answer]


def resolving(*answers: list[str] | OSError, allowed: str = "127.0.0.1/32") -> Client:
    return Client(allowed=[ip_network(allowed)], timeout=TIMEOUT, names=Names(Answers(*answers)))


@pytest.mark.parametrize("error", [OSError("no such name"), socket.gaierror(socket.EAI_NONAME, "unknown")])
async def test_a_name_that_does_not_resolve(error: OSError) -> None:
    async with started(resolving(error)) as client:
        result = await client.post("http://nowhere.test/", BODY, {})
    assert (result.status_code, result.error) == (None, "DNS lookup failed")


@pytest.mark.parametrize("second", ["10.0.0.1", "127.0.0.2", "::1", "::ffff:169.254.169.254"])
async def test_a_name_that_moves_inside_is_refused_at_the_next_attempt(second: str) -> None:
    requests: list[bytes] = []
    async with (
        serving(answering(http("200 OK"), requests)) as port,
        started(resolving(["127.0.0.1"], [second])) as client,
    ):
        assert (await client.post(f"http://rebound.test:{port}/", BODY, {})).status_code == 200
        client.names.forget()
        result = await client.post(f"http://rebound.test:{port}/", BODY, {})
    assert (result.status_code, result.error) == (None, NAME_REFUSED)
    assert len(requests) == 1


async def test_of_several_addresses_only_those_allowed_are_connected_to() -> None:
    async with serving(answering(http("200 OK"))) as port:
        async with started(resolving(["10.0.0.1", "127.0.0.1"])) as client:
            assert (await client.post(f"http://mixed.test:{port}/", BODY, {})).status_code == 200
        async with started(resolving(["10.0.0.1", "127.0.0.2", "::1"])) as client:
            result = await client.post(f"http://inside.test:{port}/", BODY, {})
    assert result.error == NAME_REFUSED


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "0x7f.1",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "\uff11\uff12\uff17.0.0.1",
    ],
)
async def test_no_spelling_of_loopback_passes_the_socket(host: str) -> None:
    requests: list[bytes] = []
    async with (
        serving(answering(http("200 OK"), requests)) as port,
        started(Client(timeout=TIMEOUT)) as client,
    ):
        result = await client.post(f"http://{host}:{port}/", BODY, {})
    refusals = ("add its network to ALLOWED_NETWORKS", "the URL cannot be used")
    assert result.status_code is None and any(refusal in (result.error or "") for refusal in refusals)
    assert requests == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "//127.0.0.1/",
        "ftp://127.0.0.1/",
        "http://",
        "http:///path",
        "http://[::1",
        "http://[nonsense]/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:port/",
        "http://exa mple.test/",
        "http://" + "a" * 300 + ".test/",
        "http://.../",
        "http://xn--/",
        "http://\udcff/",
        "http://user:hush@127.0.0.1:port/",
    ],
)
async def test_a_url_that_cannot_be_used_is_recorded_and_raises_nothing(url: str) -> None:
    async with started(resolving(*[OSError("no such name")] * 2)) as client:
        result = await client.post(url, BODY, {})
    assert result.status_code is None and result.error
    assert "hush" not in result.error


@pytest.mark.parametrize("headers", [{"X-Test": "a\r\nX-Other: b"}, {"X\n": "a"}, {"X-Test": "a\0b"}])
async def test_a_header_that_cannot_be_sent_is_recorded_and_raises_nothing(headers: dict[str, str]) -> None:
    requests: list[bytes] = []
    async with (
        serving(answering(http("200 OK"), requests)) as port,
        started(Client(allowed=[LOOPBACK], timeout=TIMEOUT)) as client,
    ):
        result = await client.post(f"http://127.0.0.1:{port}/", BODY, headers)
    assert (result.status_code, result.error) == (None, "the URL or a header cannot be used")
    assert requests == []


def test_a_failure_to_connect_is_told_in_the_systems_words() -> None:
    assert connect_reason(OSError(113, "No route to host")) == "cannot connect: No route to host"
