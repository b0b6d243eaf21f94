"""A receiver that answers every POST at once with 200, as cheaply as Python can; prints its port.

`python -m benchmarks.sink [hang]`: with `hang` it never answers.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")
HANG = "hang" in sys.argv


class Sink(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.received = b""

    def data_received(self, data: bytes) -> None:
        if HANG:
            return
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self.received, 0, end + 2)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self.received) < whole:
                return
            self.received = self.received[whole:]
            self.transport.write(ANSWER)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
