"""Importing 100,000 webhooks, against its floor: `json.load` and one `executemany`, in a process of its own too."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from benchmarks import server
from benchmarks.report import Figure

WEBHOOKS = 100_000
ROUNDS = 5
FLOOR = """
import json, sqlite3, sys
source, database = sys.argv[1:]
db = sqlite3.connect(database)
db.execute("PRAGMA journal_mode = wal")
db.execute("PRAGMA synchronous = full")
db.execute('''CREATE TABLE webhooks (webhook_id TEXT PRIMARY KEY, url TEXT, events TEXT, secret TEXT, team TEXT,
    created_at TEXT, total_calls INTEGER, failed_calls INTEGER, last_success TEXT, last_failure TEXT,
    enabled INTEGER)''')
with open(source) as file:
    entries = json.load(file)
with db:
    db.executemany("INSERT INTO webhooks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [
        (key, e["url"], json.dumps(e["events"]), e["secret"], e["team"], e["created_at"], e["total_calls"],
         e["failed_calls"], e["last_success"], e["last_failure"], e["enabled"]) for key, e in entries.items()])
"""


def run() -> list[Figure]:
    with tempfile.TemporaryDirectory(dir=server.DISK) as name:
        file = Path(name) / "webhooks.json"
        file.write_text(json.dumps(entries(), indent=2))
        rounds = [both(file, Path(name) / str(number)) for number in range(ROUNDS)]
    ours, floor = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    ratio = statistics.median(ours / floor for ours, floor in rounds)
    against = f"json.load + executemany: {floor:.2f} s"
    return [Figure(f"import of {WEBHOOKS:,} webhooks", f"{ours:.2f} s", against, ratio, "<= 2.5")]


def both(file: Path, folder: Path) -> tuple[float, float]:
    """Seconds of ours and of the floor."""
    ours = server.manage(server.migrated(folder), "import", str(file))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", FLOOR, str(file), str(folder / "floor.db")], check=True)
    return ours, time.perf_counter() - start


def entries() -> dict[str, object]:
    return {
        str(uuid.UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128)): {
            "url": f"http://homeassistant.local:8123/api/webhook/{number}",
            "events": ["game_started", "score_changed", "game_ended"][: number % 3 + 1],
            "secret": f"your-secure-secret-{number}",
            "team": f"team{number % 32}" if number % 4 else None,
            "created_at": f"2026-01-{number // 3600 + 1:02}T14:{number // 60 % 60:02}:{number % 60:02}.000001",
            "total_calls": number,
            "failed_calls": 0,
            "last_success": None,
            "last_failure": None,
            "enabled": True,
        }
        for number in range(WEBHOOKS)
    }
