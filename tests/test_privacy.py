"""Secrets stay out of logs and out of files that other users can read; databases are made only where intended."""

from __future__ import annotations

import ast
import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hookline import WebhookManager
from hookline.errors import Invalid
from hookline.store.open import open_database
from hookline.store.pool import is_postgres
from tests.conftest import ROOT, SECRET, Server, environment, manage, only_postgres, only_sqlite
from tests.databases import Place
from tests.receiver import Receiver
from tests.test_architecture import MODULES

MARK = "marked7f3a"  # in everything that no log may have
DEBUG = {"LOG_LEVEL": "debug", "ALLOWED_NETWORKS": "127.0.0.0/8", "API_KEYS": f"{MARK}-api-key-of-many-characters"}
SCHEDULE = {"DELIVERY_TIMEOUT": "1s", "LEASE": "4s", "RETRY_SCHEDULE": "50ms"}


def test_nothing_secret_is_logged_at_debug(place: Place, receiver: Receiver, tmp_path: Path) -> None:
    place = with_password(place)
    receiver.answers["/fails"] = lambda request: (500, {}, MARK.encode())
    printed = [served(place, receiver), *commands(place, tmp_path), worked(place, receiver)]
    assert all("Traceback" not in text for text in printed)
    assert all(MARK not in text for text in printed), [text for text in printed if MARK in text]
    assert not any("INSERT INTO" in text or "SELECT" in text for text in printed)
    assert "DEBUG" in printed[0] or "POST /api/v1/events" in printed[0]  # it does log at debug


def with_password(place: Place) -> Place:
    head, _, rest = place.url.partition("@")  # a server of our own trusts everyone
    if not rest or ":" in head.partition("://")[2]:
        return place
    return Place(f"{head}:{MARK}@{rest}", place.folder)


def served(place: Place, receiver: Receiver) -> str:
    """Every kind of request, right and wrong; returns what the service printed."""
    server = Server(place, DEBUG | SCHEDULE)
    try:
        server.start()
        server.client.headers["Authorization"] = f"Bearer {DEBUG['API_KEYS']}"
        for path, event in itertools.product(("/works", "/fails"), ("a", "c")):
            body = {
                "url": receiver.url + path,
                "events": [event],
                "secret": f"{MARK}-secret",
                "headers": {"X-Own": MARK},
            }
            webhook = server.client.post("/api/v1/webhooks", json=body)
            assert webhook.status_code == 201, webhook.text
        path = f"/api/v1/webhooks/{webhook.json()['webhook_id']}"
        rotated = server.client.post(f"{path}/rotate-secret", json={"secret": f"{MARK}-another-secret"})
        assert rotated.status_code == 200
        assert server.client.patch(path, json={"headers": {"X-Own": f"{MARK}2"}}).status_code == 200
        assert server.client.post("/api/v1/webhooks", json={"secret": MARK, "url": MARK}).status_code == 422
        published = {"event_type": "a", "data": {"text": MARK}}
        assert server.client.post("/api/v1/events", json=published).status_code == 202
        assert server.client.post("/api/v1/events", content=f'{{"{MARK}').status_code in (415, 422)
        receiver.wait_for(3)  # one that works, one that fails and is retried
        server.client.get("/api/v1/webhooks", headers={"Authorization": f"Bearer {MARK}-wrong"})
        server.client.get("/api/v1/deliveries")
    finally:
        printed = server.stop()
    return printed


def commands(place: Place, folder: Path) -> list[str]:
    file = folder / "webhooks.json"
    entries = {"one": {"url": "http://example.com/", "events": ["b"], "secret": f"{MARK}-of-a-file"}, "two": MARK}
    file.write_text(json.dumps(entries))
    target = f"sqlite:///{folder}/copy.db"
    done = [
        manage(place, "import", str(file), **DEBUG),
        manage(place, "import", str(file), "--skip-invalid", **DEBUG),
        manage(place, "export", str(folder / "back.json"), **DEBUG),
        manage(place, "copy", "--from", place.url, "--to", target, **DEBUG),
        manage(place, "publish", "b", json.dumps({"text": MARK}), **DEBUG),
        manage(place, "publish", "b", f'{{"{MARK}', **DEBUG),
        manage(place, "migrate", "status", **DEBUG),
        manage(place, "purge", "--dry-run", **DEBUG),
    ]
    assert [process.returncode for process in done] == [1, 0, 0, 0, 0, 1, 0, 0]
    return [process.stdout + process.stderr for process in done]


def worked(place: Place, receiver: Receiver) -> str:
    """A worker delivers what was published without one; returns what it printed."""
    command = [sys.executable, str(ROOT / "manage.py"), "worker"]
    env = environment(DATABASE_URL=place.url, **DEBUG, **SCHEDULE)
    worker = subprocess.Popen(command, env=env, cwd=place.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    came = len(receiver.received)
    try:
        assert manage(place, "publish", "c", json.dumps({"text": MARK})).returncode == 0
        receiver.wait_for(came + 2)
    finally:
        worker.terminate()
        printed = worker.communicate(timeout=30)[0]
    return printed.decode()


def test_no_level_is_set_on_the_root_logger() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "basicConfig":
                    assert "level" not in {keyword.arg for keyword in node.keywords}, path
                if node.func.attr == "setLevel":
                    assert ast.unparse(node.func.value) == "logging.getLogger('hookline')", path


def modes(folder: Path) -> dict[str, str]:
    return {path.name: f"{stat.S_IMODE(path.stat().st_mode):o}" for path in sorted(folder.iterdir())}


PERMISSIVE = """
import os, sys
os.umask(0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_the_database_and_its_folders_are_their_owners_alone_from_the_first_byte(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        db = open_database(f"sqlite:///{tmp_path}/new/data/webhooks.db", create=True)
        assert modes(tmp_path / "new" / "data") == {"webhooks.db": "600"}  # before SQLite wrote to it
        assert (tmp_path / "new" / "data" / "webhooks.db").stat().st_size == 0
        manager = WebhookManager(tmp_path / "new" / "data" / "webhooks.db")
        manager.register("http://example.com/", ["a"], SECRET)
        with manager.db.connection_context():
            manager.db.execute_sql("SELECT 1 FROM webhooks")
            open_modes = modes(tmp_path / "new" / "data")
        assert open_modes == {"webhooks.db": "600", "webhooks.db-shm": "600", "webhooks.db-wal": "600"}
        assert modes(tmp_path) == {"new": "700"}
        assert modes(tmp_path / "new") == {"data": "700"}
        manager.db.close_all()  # type: ignore[attr-defined]
        db.close_all()  # type: ignore[attr-defined]
    finally:
        os.umask(before)


@only_sqlite
def test_what_the_commands_write_is_their_users_alone(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "webhooks.json"
    file.write_text(json.dumps({"one": {"url": "http://example.com/", "events": ["a"], "secret": SECRET}}))
    back = tmp_path / "back.json"
    back.write_text("{}")
    back.chmod(0o644)
    copy = f"sqlite:///{tmp_path}/copies/copy.db"
    migrated = f"sqlite:///{tmp_path}/migrated/webhooks.db"
    for url, *arguments in (
        (place.url, "import", str(file)),
        (place.url, "export", str(back)),
        (place.url, "copy", "--from", place.url, "--to", copy),
        (migrated, "migrate", "up"),
    ):
        command = [sys.executable, "-c", PERMISSIVE, str(ROOT / "manage.py"), *arguments]
        env = environment(DATABASE_URL=url)
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    written = modes(tmp_path)
    assert {name: written[name] for name in ("back.json", "webhooks.json.backup", "copies", "migrated")} == {
        "back.json": "600",
        "webhooks.json.backup": "600",
        "copies": "700",
        "migrated": "700",
    }
    assert set(modes(tmp_path / "copies").values()) == {"600"}
    assert set(modes(tmp_path / "migrated").values()) == {"600"}


@only_sqlite
def test_a_database_that_others_can_read_is_named_and_left_as_it_is(place: Place) -> None:
    place.file.chmod(0o644)
    done = manage(place, "migrate", "status")
    assert done.returncode == 0
    assert f"{place.file} holds secrets, and other users can read it" in done.stderr
    assert modes(place.folder)["webhooks.db"] == "644"
    place.file.chmod(0o600)
    assert manage(place, "migrate", "status").stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        "manage.py migrate status",
        "manage.py migrate down",
        "manage.py migrate diff",
        "manage.py export x.json",
        "manage.py publish a {}",
        "manage.py purge",
        "manage.py worker",
        "app.py",
    ],
)
def test_a_wrong_working_directory_makes_no_database(tmp_path: Path, command: str) -> None:
    program, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments],
        env=environment(PORT="0"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"there is no database at {tmp_path}/data/webhooks.db: run  python manage.py migrate up" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_database_behind_a_link_is_made_where_the_link_points(tmp_path: Path) -> None:
    """`migrate up` said to run `migrate up`."""
    (tmp_path / "webhooks.db").symlink_to(tmp_path / "volume" / "real.db")
    assert manage(Place("sqlite:///webhooks.db", tmp_path), "migrate", "up").returncode == 0
    assert modes(tmp_path / "volume") == {"real.db": "600"}


def test_a_copy_from_a_file_that_is_not_there_names_it_and_makes_nothing(tmp_path: Path) -> None:
    place = Place("sqlite:///webhooks.db", tmp_path)
    done = manage(place, "copy", "--from", "sqlite:///from.db", "--to", "sqlite:///to.db")
    assert done.returncode == 1
    assert f"there is no file at --from: {tmp_path}/from.db" in done.stderr
    (tmp_path / "from.db").touch(0o600)  # without our tables
    done = manage(place, "copy", "--from", "sqlite:///from.db", "--to", "sqlite:///to.db")
    assert "--from cannot be read" in done.stderr
    assert not (tmp_path / "to.db").exists()


@only_sqlite
def test_a_database_that_was_removed_is_not_made_anew(place: Place) -> None:
    db = open_database(place.url)
    place.file.unlink()
    with pytest.raises(Exception, match="there is no database at"):
        db.connect()
    assert not place.file.exists()


@only_postgres
def test_a_manager_takes_the_url_of_a_postgresql(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = WebhookManager(place.url)
    assert is_postgres(manager.db)
    assert manager.register("http://example.com/", ["a"], SECRET) in manager.webhooks
    manager.db.close_all()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_a_manager_takes_urls_and_paths_of_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    webhook_ids = set()
    for place in ("one.db", tmp_path / "one.db", "sqlite:///one.db", f"sqlite:///{tmp_path}/one.db"):
        manager = WebhookManager(place)
        webhook_ids.add(manager.register("http://example.com/", ["a"], SECRET))
        assert set(manager.webhooks) == webhook_ids
        manager.db.close_all()  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["one.db"]
    with pytest.raises(Invalid, match="path of a file"):
        WebhookManager(":memory:")
