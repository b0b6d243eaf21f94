"""`app.py` and `manage.py` as processes of their own, each without the half second that its imports would take.

Each test process has one process which has imported both programs and run nothing. It forks for every start: the child
runs the file as `__main__` with its own folder, environment and output, up to the interpreter's regular end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import queue
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NUMBER = struct.Struct("i")  # a process id, then an exit status
LARGEST_REQUEST = 2**20  # bytes


class Process:
    """A started program; its methods are those of subprocess.Popen. Output goes to two file descriptors."""

    def __init__(
        self, program: str, *arguments: str, env: Mapping[str, str], folder: Path, stdout: int, stderr: int = 2
    ) -> None:
        request = {"arguments": [str(ROOT / program), *arguments], "env": dict(env), "folder": str(folder)}
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(forking())
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], [stdout, stderr])
        self.pid = self._number()

    def _number(self) -> int:
        return int(NUMBER.unpack(self._connection.recv(NUMBER.size))[0])

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, negative after a signal. Raises TimeoutError."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = self._number()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(BlockingIOError):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Output:
    """A pipe, read by a thread so that no program waits for a reader. Start the program within `with`."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        self.text = ""  # as far as it was asked for
        self._lines = queue.SimpleQueue[str]()
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()

    def _read(self, reader: int) -> None:
        with open(reader, errors="replace") as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.writer)  # the program has it, and with that ends what comes

    def _next(self, seconds: float) -> str:
        line = self._lines.get(timeout=max(0, seconds))
        if not line:
            self._lines.put(line)  # it remains the end
        return line

    def wait_for(self, start: str, seconds: float = 30) -> str:
        """Wait for a line that begins so, and return what follows. Raises AssertionError with what came instead."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while line := self._next(deadline - time.monotonic()):
                self.text += line
                if line.startswith(start):
                    return line.removeprefix(start).strip()
        raise AssertionError(f"no line {start!r} came: {self.text}")

    def rest(self) -> str:
        """Wait for the end of the program that prints; returns what was not asked for before."""
        before = len(self.text)
        while line := self._next(20):
            self.text += line
        return self.text[before:]


@functools.cache
def forking() -> str:
    """Start the process that forks; returns the path of the socket on which it takes requests."""
    folder = tempfile.TemporaryDirectory(prefix="hookline-fork-")
    path = f"{folder.name}/socket"
    command = [sys.executable, "-m", "tests.processes", path]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout and process.stdout.readline() == b"ready\n"

    def stop() -> None:
        process.communicate()  # it ends with its input
        folder.cleanup()

    atexit.register(stop)
    return path


def fork_for_requests(path: str) -> None:
    """Import all that the programs may, and fork for each connection until the input ends."""
    import commands
    import hookline

    for package in (commands, hookline):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    importlib.import_module("app")
    gc.freeze()  # an interpreter that ends would else touch, and so copy, every object
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who supervise
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
        else:
            return
    run(*supervised(connection))


def supervised(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork once more: the child gets the request, and its parent reports the child's id and exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 2)
    while not message.endswith(b"\n"):
        message += connection.recv(LARGEST_REQUEST)
    if pid := os.fork():
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # the tests have ended before
            connection.sendall(NUMBER.pack(pid))
            connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        os._exit(0)
    connection.close()
    return json.loads(message), descriptors


def run(request: dict[str, Any], descriptors: list[int]) -> None:
    for target, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *descriptors]):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["arguments"]
    sys.path[0] = str(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    fork_for_requests(sys.argv[1])
