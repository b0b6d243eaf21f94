"""Every command and snippet of the README, and of the Procfile, as a newcomer would paste it, in a folder of its own.

Only the ports are other ones, and what `make` would install is there already.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
from standardwebhooks.webhooks import Webhook

from tests.conftest import DATA, ROOT, environment, manage
from tests.databases import Place, free_port

README = (ROOT / "README.md").read_text()
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
FIRST, DEPLOY, MOVING = "First webhook in a minute", "On a host with a Procfile", "Moving from the JSON file"
PYTHON = ["From Python", "In your own transaction"]
TREE = ["Makefile", "requirements.txt", "requirements-postgres.txt", "manage.py", "app.py"]

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "make", "curl"))), reason="the README wants bash, make and curl"
)


def blocks(heading: str) -> list[str]:
    """What is to be pasted, in the section of this heading."""
    section = re.split(r"^## ", README, flags=re.MULTILINE)
    (found,) = [text for text in section if text.startswith(heading + "\n")]
    return re.findall(r"^```(?:sh|python)\n(.*?)^```$", found, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As after `git clone`, with `.venv` made."""
    for name in TREE:
        (tmp_path / name).symlink_to(ROOT / name)
    for path in (tmp_path / ".venv/bin/python", tmp_path / "bin/python"):
        path.parent.mkdir(parents=True)
        path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        path.chmod(0o755)
    for name in (".run", ".postgres"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def settings(folder: Path, **more: str) -> dict[str, str]:
    return environment(**more) | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


def pasted(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-ec", script]
    return subprocess.run(command, env=settings(folder, **more), cwd=folder, capture_output=True, text=True, timeout=90)


@contextmanager
def terminal(script: str, folder: Path, until: str, **more: str) -> Iterator[tuple[list[str], subprocess.Popen[str]]]:
    """A terminal in which this goes on, from the line that begins so; with all lines until then."""
    process = subprocess.Popen(
        ["bash", "-ec", script],
        env=settings(folder, **more),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        while not (lines and lines[-1].startswith(until)):
            line = process.stdout.readline()
            assert line, lines
            lines.append(line)
        yield lines, process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


def test_nothing_of_the_readme_is_left_out() -> None:
    assert {heading: len(blocks(heading)) for heading in (FIRST, *PYTHON, MOVING, DEPLOY)} == {
        FIRST: 4,
        **dict.fromkeys(PYTHON, 1),
        MOVING: 1,
        DEPLOY: 1,
    }
    assert README.count("```") == 2 * 8
    assert not re.search(r"^    \S", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_a_newcomer_gets_a_first_webhook_by_pasting(folder: Path) -> None:
    port, receiving = free_port(), free_port()
    run, receive, publish, look = (
        block.replace("8005", str(port))
        .replace("8006", str(receiving))
        .replace("manage.py listen", f"manage.py listen --port {receiving}")
        for block in blocks(FIRST)
    )
    with (
        terminal(run, folder, "Hookline serves on", PORT=str(port)),
        terminal(receive, folder, "listening on") as (shown, receiver),
    ):
        secret = json.loads(shown[0])["secret"]
        assert secret.startswith("whsec_") and Webhook(secret)
        published = json.loads(pasted(publish, folder).stdout)
        assert published["deliveries"] == 1
        assert receiver.stdout is not None
        assert receiver.stdout.readline().startswith('game_started: {"home_team":"ne","away_team":"buf","event_type"')
        assert receiver.stdout.readline() == "  signature: holds\n"
        for _ in range(100):
            (delivery,) = json.loads(pasted(look, folder).stdout)["data"]
            if delivery["status"] == "succeeded":
                break
        assert (delivery["event_id"], delivery["status"]) == (published["event_id"], "succeeded")


def test_the_snippets_of_python_run(tmp_path: Path) -> None:
    for heading in PYTHON:
        (snippet,) = blocks(heading)
        command = [sys.executable, "-c", snippet]
        env = environment(PYTHONPATH=str(ROOT))
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "data/webhooks.db", "SELECT event_type FROM events") == [("game_started",)]
    ((secret,),) = rows(tmp_path / "data/webhooks.db", "SELECT secret FROM webhooks")
    assert secret.startswith("whsec_")
    assert rows(tmp_path / "shop.db", 'SELECT status FROM "order"') == [("paid",)]
    assert rows(tmp_path / "shop.db", "SELECT event_type FROM events") == [("order.paid",)]


def rows(file: Path, statement: str) -> list[tuple[str]]:
    with closing(sqlite3.connect(file)) as db:
        return db.execute(statement).fetchall()


def test_the_move_from_the_json_file_runs(folder: Path) -> None:
    assert pasted("python manage.py migrate up", folder).returncode == 0
    shutil.copy(DATA / "webhooks.json", folder / "data/webhooks.json")
    (script,) = blocks(MOVING)
    done = pasted(script, folder)
    assert done.returncode == 0
    assert "would import: " in done.stdout and "\nimported: " in done.stdout


def test_a_first_deploy_needs_the_two_lines_of_the_readme_and_no_more(empty: Place, folder: Path) -> None:
    (first,) = blocks(DEPLOY)
    assert len(first.splitlines()) == 2
    port = free_port()
    web = PROCFILE["web"].replace("0.0.0.0", "127.0.0.1")  # nothing here listens to others
    url = {"DATABASE_URL": empty.url, "PORT": str(port)}
    for process in (web, PROCFILE["worker"]):
        before = pasted(process, folder, **url)
        assert before.returncode == 1
        assert "python manage.py migrate up" in before.stderr and before.stderr.count("\n") == 1
    script = f"{first}\necho key $API_KEYS\n{web}"
    with terminal(script, folder, "Hookline serves on", **url) as (lines, _):
        (key,) = [line.split()[1] for line in lines if line.startswith("key ")]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            forwarded = {"X-Forwarded-For": "198.51.100.1"}
            path = "/api/v1/webhooks"
            assert client.get(path, headers=forwarded).status_code == 401
            assert client.get(path, headers=forwarded | {"Authorization": f"Bearer {key}"}).status_code == 200
    with terminal(PROCFILE["worker"], folder, "Hookline delivers", **url):
        pass


def test_a_deploy_without_a_database_that_lasts_is_told_so_in_one_line(folder: Path) -> None:
    for process in PROCFILE.values():
        done = pasted(process, folder, DYNO="web.1")
        assert done.returncode == 1
        assert "attach a PostgreSQL and set DATABASE_URL" in done.stderr and done.stderr.count("\n") == 1
    assert not (folder / "data").exists()
    assert manage(Place("postgresql://", folder), "migrate", "status").returncode == 1
