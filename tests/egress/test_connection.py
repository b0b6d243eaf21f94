"""The client and the bytes of an answer: what they mean, also to aiohttp, and however they are cut into packets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from itertools import pairwise

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookline.egress.client import Client
from hookline.egress.connection import KEPT, Answer, Broken, Connection
from tests.egress.answers import ANSWERS
from tests.egress.serving import serving

BODY = b'{"event":"game_started"}'
Outcome = int | str  # the status, or "no answer"

DIFFERENCES: dict[str, tuple[Outcome, Outcome]] = {  # ours, aiohttp's
    "200 with folded headers": ("no answer", 200),  # obsolete, and a way to smuggle (RFC 9112, 5.2)
    "200 with bare line feeds": ("no answer", 200),
    "200 with 150 headers": (200, "no answer"),  # we take 200
    "200 with more than its length": (200, "no answer"),  # it was whole: what comes behind it is nobody's
    "204 with a body": (204, "no answer"),
    "101": ("no answer", 101),  # no such status ends a delivery, nor do those that HTTP does not have
    "000": ("no answer", 0),
    "099": ("no answer", 99),
    "600": ("no answer", 600),
    "999": ("no answer", 999),
}


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """A server that reads a request, answers it with these bytes, and closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(BODY))
        writer.write(answer)
        writer.close()

    async with serving(handle) as port:
        yield port


async def ours(url: str) -> Outcome:
    client = Client(allowed=[ip_network("127.0.0.0/8")], timeout=5)
    await client.start()
    result = await client.post(url, BODY, {})
    await client.close()
    return "no answer" if result.status_code is None else result.status_code


async def aiohttps(url: str) -> Outcome:
    """As the deliveries were made with it: it reads as much of the body as was kept."""
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
        try:
            async with session.post(url, data=BODY, allow_redirects=False) as answer:
                if (answer.content_length or KEPT + 1) <= KEPT:
                    await answer.read()
                else:
                    read = 0
                    while read < KEPT and (piece := await answer.content.read(KEPT - read)):
                        read += len(piece)
                answer.close()
                return answer.status
        except aiohttp.ClientError:
            return "no answer"


def test_the_table_has_more_than_60_answers() -> None:
    assert len(ANSWERS) > 60


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_means_what_it_means_to_aiohttp(name: str) -> None:
    async with answering(ANSWERS[name]) as port:
        outcomes = await ours(f"http://127.0.0.1:{port}/"), await aiohttps(f"http://127.0.0.1:{port}/")
    expected = DIFFERENCES.get(name)
    assert outcomes == expected if expected else outcomes[0] == outcomes[1], outcomes


async def fed(pieces: list[bytes]) -> Answer | str:
    """What a connection makes of these packets, and of the end of the connection behind them."""
    near, far = socket.socketpair()
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(lambda one: None, lambda one: None), sock=near)
    asking = asyncio.ensure_future(connection.request(b"a request"))
    await asyncio.sleep(0)
    for piece in pieces:
        if not asking.done():
            connection.data_received(piece)
    far.close()
    try:
        async with asyncio.timeout(5):
            return await asking
    except Broken as exc:
        return str(exc)
    finally:
        connection.close()


def cut(answer: bytes, at: list[int]) -> list[bytes]:
    ends = [0, *sorted({position % (len(answer) + 1) for position in at}), len(answer)]
    return [answer[start:end] for start, end in pairwise(ends) if end > start]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(ANSWERS)), at=st.lists(st.integers(0, 4000), max_size=8))
def test_an_answer_means_the_same_however_it_is_cut_into_packets(name: str, at: list[int]) -> None:
    async def both() -> tuple[Answer | str, Answer | str]:
        return await fed([ANSWERS[name]] if ANSWERS[name] else []), await fed(cut(ANSWERS[name], at))

    whole, in_pieces = asyncio.run(both())
    assert whole == in_pieces


@settings(max_examples=500, deadline=None)
@given(base=st.sampled_from(sorted(ANSWERS)), at=st.integers(0, 4000), junk=st.binary(max_size=40))
def test_no_bytes_make_it_raise_anything_but_broken(base: str, at: int, junk: bytes) -> None:
    answer = ANSWERS[base]
    position = at % (len(answer) + 1)
    assert asyncio.run(fed([answer[:position] + junk + answer[position:]]))
