"""The time from the start of the service until it is ready, and its memory when idle."""

from __future__ import annotations

import re
import statistics
import tempfile
from pathlib import Path

from benchmarks import server
from benchmarks.report import Figure

STARTS = 5


def run() -> list[Figure]:
    times, sizes = [], []
    with tempfile.TemporaryDirectory(dir=server.DISK) as name:
        database = server.migrated(Path(name))
        for _ in range(STARTS):
            with server.hookline(database) as running:
                times.append(running.ready_after)
                sizes.append(resident(running.pid))
    ready, memory = statistics.median(times), statistics.median(sizes)
    return [
        Figure("ready after start", f"{ready:.2f} s", "1 s", ready, "<= 1"),
        Figure("resident memory, idle", f"{memory:.0f} MB", "90 MB", memory / 90, "<= 1"),
    ]


def resident(pid: int) -> float:
    """The resident memory of a process, in MB."""
    line = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert line
    return int(line[1]) * 1024 / 1e6
