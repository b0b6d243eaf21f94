"""`import` and `export`: the files that they take, and those that they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.running import refused
from tests.conftest import ROOT, environment, manage, only_sqlite
from tests.databases import Place


@only_sqlite
def test_an_import_warns_of_addresses_that_the_guard_refuses(place: Place) -> None:
    file = place.folder / "webhooks.json"
    entry = '{"url": "http://192.168.1.5:8123/hook", "events": ["a"], "secret": "0123456789abcdef"}'
    file.write_text(f'{{"one": {entry}}}')
    warned = manage(place, "import", str(file), "--dry-run")
    assert "one: it will not be delivered to: 192.168.1.5" in warned.stderr
    assert "ALLOWED_NETWORKS" in warned.stderr
    assert manage(place, "import", str(file), ALLOWED_NETWORKS="192.168.0.0/16").stderr == ""


@only_sqlite
@pytest.mark.parametrize("command", ["export", "import"])
def test_a_pipe_is_neither_read_nor_replaced(place: Place, command: str) -> None:
    """Its backup came to lie in /dev, secrets included."""
    reader, writer = os.pipe()
    os.close(writer)
    name = f"/dev/fd/{reader}"
    program = [sys.executable, str(ROOT / "manage.py"), command, name]
    env = environment(DATABASE_URL=place.url)
    done = subprocess.run(
        program, env=env, cwd=place.folder, capture_output=True, text=True, timeout=60, pass_fds=[reader]
    )
    os.close(reader)
    verb = "written" if command == "export" else "read"
    refused(done, 1, f"{name} cannot be {verb}: it is not a file")


@only_sqlite
@pytest.mark.parametrize("command", ["export", "import"])
@pytest.mark.parametrize("name", ["device", ""])
def test_a_device_or_folder_is_neither_read_nor_replaced(place: Place, command: str, name: str) -> None:
    ours, theirs = os.openpty()
    device = Path(os.ttyname(theirs))
    (place.folder / "device").symlink_to(device)
    before = set(os.listdir(place.folder))
    done = manage(place, command, name)
    assert done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1].startswith("Error: ") and "Traceback" not in done.stderr
    assert device.is_char_device()
    assert {left for left in os.listdir(place.folder) if not left.startswith("webhooks.db")} <= before
    os.close(ours)
    os.close(theirs)


@only_sqlite
def test_an_export_to_a_link_writes_the_file_that_it_points_to(place: Place) -> None:
    (place.folder / "real.json").write_text("old")
    (place.folder / "link.json").symlink_to("real.json")
    assert manage(place, "export", "link.json").returncode == 0
    assert (place.folder / "link.json").is_symlink()
    assert (place.folder / "real.json").read_text() == "{}"
