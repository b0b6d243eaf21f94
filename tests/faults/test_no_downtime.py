"""Requests go on, and none fails, while a migration rebuilds the table and 100,000 webhooks are imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import DATA, ROOT, SECRET, Server, environment, manage, running
from tests.databases import Place

REBUILD = """
def up(migrator, db):
    migrator.migrate(migrator.drop_not_null("webhooks", "url"))
"""
MIGRATE = """
import sys
from pathlib import Path
from hookline.store import schema
from hookline.store.open import open_database
print(schema.up(open_database(sys.argv[1], long_work=True), directory=Path(sys.argv[2])))
"""
IMPORTED = 100_000
MOST_REQUESTS = 20_000


def test_no_request_fails_while_a_migration_and_an_import_run_beside_them(
    backend: str, empty: Place, tmp_path: Path
) -> None:
    adopted = backend == "sqlite"
    if adopted:
        shutil.copy(DATA / "webhooks.db", empty.file)
    assert manage(empty, "migrate", "up").returncode == 0
    file = tmp_path / "webhooks.json"
    entry = {"url": "http://example.com/", "events": ["a"], "secret": SECRET, "team": "ne"}
    file.write_text(json.dumps({f"imported-{n}": entry for n in range(IMPORTED)}))
    directory = Path(shutil.copytree(ROOT / "migrations", tmp_path / "migrations"))
    (directory / "0009_rebuild.py").write_text(REBUILD)

    with running(empty) as server:
        done, registered = threading.Event(), list[str]()
        with ThreadPoolExecutor(3) as pool:
            loops = [pool.submit(request_until, done, server, registered) for _ in range(3)]
            try:
                imported = manage(empty, "import", str(file))
                migrated = subprocess.run(
                    [sys.executable, "-c", MIGRATE, empty.url, str(directory)],
                    cwd=ROOT,
                    env=environment(),
                    capture_output=True,
                    text=True,
                )
            finally:
                done.set()
            assert all(loop.result() > 10 for loop in loops)
        assert imported.stdout.endswith(f"imported: {IMPORTED} new, 0 updated, 0 unchanged, 0 invalid\n"), (
            imported.stderr
        )
        assert migrated.stdout == "['0009_rebuild']\n", migrated.stderr
        listed = server.client.get("/api/v1/webhooks/list").json()["webhooks"]
        assert len(listed) == 26 * adopted + IMPORTED + len(registered)
        assert set(registered) <= {webhook["id"] for webhook in listed}
        assert server.register().status_code == 201


def request_until(done: threading.Event, server: Server, registered: list[str]) -> int:
    """How many rounds were answered; raises at the first that was not."""
    for rounds in range(MOST_REQUESTS):
        if done.is_set():
            return rounds
        answer = server.register()
        assert answer.status_code == 201, answer.text
        registered.append(answer.json()["webhook_id"])
        for path in (f"/api/v1/webhooks/{registered[-1]}", "/api/v1/webhooks?limit=5", "/ready"):
            answer = server.client.get(path)
            assert answer.status_code == 200, answer.text
    return MOST_REQUESTS
