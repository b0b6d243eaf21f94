"""Commands run as a user runs them, and what a refusal looks like."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, environment

DEEP = "[" * 100_000
UNPRINTABLE = re.compile(r"[^\n\x20-\x7e]")


def refused(done: subprocess.CompletedProcess[str], status: int, sentence: str) -> None:
    assert done.returncode == status, done
    assert done.stderr.splitlines()[-1] == f"Error: {sentence}"
    assert "Traceback" not in done.stderr
    assert not UNPRINTABLE.search(done.stdout + done.stderr)


def run(tmp_path: Path, *arguments: str | bytes, **settings: str) -> subprocess.CompletedProcess[str]:
    """A command that needs no database, with any bytes as its arguments."""
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    env = environment(**settings)
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, input="")
