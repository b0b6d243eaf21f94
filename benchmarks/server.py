"""Servers under measurement: each a process of its own, on one core; the load comes from the other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER_CORE, LOAD_CORE = 0, (os.cpu_count() or 1) - 1
DISK = ROOT / "data"  # not /tmp, which may be memory
DISK.mkdir(exist_ok=True)


@dataclass
class Running:
    url: str
    pid: int
    ready_after: float  # seconds


def environment(database: Path | str, port: int = 0) -> dict[str, str]:
    """`database`: a file of SQLite, or a URL."""
    url = database if isinstance(database, str) else f"sqlite:///{database}"
    settings = {"DATABASE_URL": url, "PORT": str(port), "HOST": "127.0.0.1", "LOG_LEVEL": "warning"}
    return {**os.environ, **settings, "PYTHONPATH": str(ROOT)}


def migrated(folder: Path) -> Path:
    """A new, migrated database file."""
    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "webhooks.db"
    manage(database, "migrate", "up")
    return database


def manage(database: Path, *arguments: str) -> float:
    """Run `manage.py`; returns the seconds it took."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    subprocess.run(command, env=environment(database), check=True, capture_output=True)
    return time.perf_counter() - start


@contextmanager
def hookline(database: Path | str, pinned: bool = True) -> Iterator[Running]:
    with serving([sys.executable, str(ROOT / "app.py")], database, pinned) as running:
        yield running


@contextmanager
def uvicorn(app: str, database: Path) -> Iterator[Running]:
    with serving(
        [sys.executable, "-m", "uvicorn", app, "--no-access-log", "--log-level", "warning"], database
    ) as running:
        yield running


@contextmanager
def serving(command: list[str], database: Path | str, pinned: bool = True) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    arguments = [*command, "--port", str(port)] if "-m" in command else command
    start = time.perf_counter()
    process = subprocess.Popen(arguments, env=environment(database, port), cwd=ROOT, stdout=subprocess.DEVNULL)
    if pinned:
        os.sched_setaffinity(process.pid, {SERVER_CORE})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        yield Running(url, process.pid, time.perf_counter() - start)
    finally:
        process.terminate()
        process.wait(20)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=5).close()
            return
        except OSError:
            time.sleep(0.01)
    raise RuntimeError("the server did not get ready")
