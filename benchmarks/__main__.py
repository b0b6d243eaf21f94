"""`python -m benchmarks [NAME ...]`: run all, or those named, and print the table of the README."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from benchmarks import backends, connections, deliver, http, scale, startup, transfer
from benchmarks.report import HEADER, Figure

ALL: dict[str, Callable[[], Iterable[Figure]]] = {
    "http": http.run,
    "transfer": transfer.run,
    "scale": scale.run,
    "startup": startup.run,
    "connections": connections.run,
    "deliver": deliver.run,
    "backends": backends.run,
}


def main() -> None:
    unknown = [name for name in sys.argv[1:] if name not in ALL]
    if unknown:
        sys.exit(f"no benchmark called {unknown[0]}; there are {', '.join(ALL)}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine}\n\n{HEADER}", flush=True)
    for name in sys.argv[1:] or ALL:
        for figure in ALL[name]():
            print(figure.line(), flush=True)


if __name__ == "__main__":
    main()
