"""Output on a terminal: bars that give the cursor back, and nothing that the terminal would obey."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from peewee import Database

from commands.terminal import SHORT
from hookline.store import sql
from hookline.store.pool import is_postgres
from tests.conftest import ROOT, SECRET, environment
from tests.databases import Place

HIDDEN, SHOWN = b"\x1b[?25l", b"\x1b[?25h"


def test_ctrl_c_in_a_progress_bar_gives_the_cursor_back(place: Place, db: Database) -> None:
    with db.connection_context(), db.atomic():
        ids = [{"event_id": f"evt_{number}"} for number in range(SHORT)]
        values = f"{sql.param(db, 'event_id')}, 'a', '{{}}', '2020-01-01T00:00:00.000000Z'"
        insert = f"INSERT INTO events (event_id, event_type, payload, created_at) VALUES ({values})"
        db.cursor().executemany(insert, ids)
    ours, theirs = os.openpty()
    command = [sys.executable, str(ROOT / "manage.py"), "purge"]
    env = environment(DATABASE_URL=place.url)
    with db.connection_context(), db.atomic():  # on SQLite this is the lock of all writers
        if is_postgres(db):
            db.execute_sql("LOCK TABLE events IN SHARE ROW EXCLUSIVE MODE")
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it
        process = subprocess.Popen(
            command, env=env, cwd=place.folder, stdout=subprocess.PIPE, stderr=theirs, preexec_fn=heed
        )
        os.close(theirs)
        printed = os.read(ours, 4096)  # the bar, before the first batch, which waits for the lock
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the end of what a terminal was told
        while more := os.read(ours, 4096):
            printed += more
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Aborted!" in printed
    assert printed.rindex(SHOWN) > printed.rindex(HIDDEN)


@pytest.mark.parametrize("arguments", [("--help",), ("verify", "body", "--secret", SECRET)])
def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "body").write_bytes(b"{}")
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, env=environment(), cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


@pytest.mark.parametrize(
    "arguments", [("verify", "x\x1b[2J", "--secret", SECRET), ("x\x1b[2J",), ("verify", "--x\x1b[2J")]
)
def test_what_a_message_repeats_of_the_command_line_is_escaped(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ours, theirs = os.openpty()  # click takes control characters out where there is no terminal
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):
        while more := os.read(ours, 4096):
            printed += more
    os.close(ours)
    assert process.wait(60) == 2
    assert b"\\x1b[2J" in printed and b"\x1b" not in printed
