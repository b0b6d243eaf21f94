"""Databases that a command cannot use: one clear line, whichever command it is."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, manage, only_postgres, only_sqlite
from tests.databases import Place, execute

COMMANDS = [
    ("migrate", "status"),
    ("migrate", "down"),
    ("purge",),
    ("export", "x.json"),
    ("publish", "a", "{}"),
    ("worker",),
]


@only_postgres
def test_a_role_that_lacks_rights_is_told_so_in_one_line(place: Place) -> None:
    role = f"stranger_{uuid.uuid4().hex}"
    execute(place.url, f"CREATE ROLE {role} LOGIN PASSWORD 'hush'")
    try:
        head, _, address = place.url.partition("://")
        stranger = Place(f"{head}://{role}:hush@{address.rpartition('@')[2]}", place.folder)
        done = [manage(stranger, *command) for command in COMMANDS]
        done.append(manage(stranger, "copy", "--from", stranger.url, "--to", f"sqlite:///{place.folder}/to.db"))
        command = [sys.executable, str(ROOT / "app.py")]
        env = environment(DATABASE_URL=stranger.url)
        done.append(subprocess.run(command, env=env, cwd=place.folder, capture_output=True, text=True, timeout=60))
        for refusal in done:
            assert refusal.returncode == 1
            assert "lacks a right" in refusal.stderr
            assert refusal.stderr.count("\n") == 1
    finally:
        execute(place.url, f"DROP ROLE {role}")


@only_sqlite
def test_a_file_that_is_no_database_is_named_in_one_line(empty: Place) -> None:
    empty.file.write_bytes(b"not a database, but long enough to have a header " * 99)
    command = [sys.executable, str(ROOT / "app.py")]
    env = environment(DATABASE_URL=empty.url)
    done = [manage(empty, *command) for command in COMMANDS]
    done.append(subprocess.run(command, env=env, cwd=empty.folder, capture_output=True, text=True, timeout=60))
    for refusal in done:
        assert refusal.returncode == 1
        assert f"{empty.file} cannot be opened: file is not a database" in refusal.stderr
        assert refusal.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["postgresql://u:p%ed@localhost/x", "postgresql://u:hush@db..example/x"])
def test_a_postgresql_url_that_nobody_can_read_is_one_line(tmp_path: Path, url: str) -> None:
    done = [manage(Place(url, tmp_path), "migrate", command) for command in ("up", "status")]
    command = [sys.executable, str(ROOT / "app.py")]
    env = environment(DATABASE_URL=url)
    done.append(subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60))
    for refusal in done:
        assert (refusal.returncode, refusal.stdout, refusal.stderr.count("\n")) == (1, "", 1)
        assert "PostgreSQL" in refusal.stderr and "hush" not in refusal.stderr
