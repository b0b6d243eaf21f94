"""Files: written so that after a crash each is whole under its final name, or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hookline.errors import Invalid


def create_private(path: Path) -> None:
    """Make an empty file, and its folders, for their owner alone; what exists is left as it is.

    If the path is a link to a missing file, that file is made. SQLite gives its `-wal` and `-shm` the mode of the file.
    Raises Invalid.
    """
    path = Path(os.path.realpath(path))
    try:
        for folder in reversed([folder for folder in path.parents if not folder.exists()]):
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise Invalid(f"the folder of the database, {path.parent}, cannot be made: {exc.strerror}") from exc
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return
    except OSError as exc:
        raise Invalid(f"{path} cannot be made: {exc.strerror}") from exc


def is_open_to_others(path: str) -> bool:
    """True if the mode of the file lets other users of this machine read or write it."""
    return os.name == "posix" and bool(os.stat(path).st_mode & 0o066)


def back_up(path: Path, content: bytes) -> Path:
    """Write a durable copy beside the file: `NAME.backup`, or `.backup.1` and so on where an older one differs."""
    for number in range(10_000):
        backup = path.with_name(f"{path.name}.backup" + (f".{number}" if number else ""))
        if not backup.exists():
            write_new(backup, content)
            return backup
        if backup.read_bytes() == content:
            return backup
    raise Invalid(f"{path} has too many backups beside it")


def write_new(path: Path, content: bytes) -> None:
    """Write a new file; raises Invalid if it cannot be written or exists. It never leaves half a file."""
    temporary = write_temporary(path, content)
    try:
        os.link(temporary, path)
    except OSError as exc:
        raise Invalid(f"{path} cannot be written: {exc.strerror}") from exc
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file, or the file that a link points to: readers see the old or the new one, whole. Raises Invalid."""
    if path.exists() and not path.is_file():
        raise Invalid(f"{path} cannot be written: it is not a file")  # but a device or a pipe, such as /dev/stdout
    target = path.resolve()
    temporary = write_temporary(target, content)
    try:
        os.replace(temporary, target)
    except OSError as exc:
        temporary.unlink()
        raise Invalid(f"{path} cannot be written: {exc.strerror}") from exc
    sync_folder(target.parent)


def write_temporary(path: Path, content: bytes) -> Path:
    """Write the content durably to a new file in the same folder, readable by its owner alone: it holds secrets."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as exc:
        raise Invalid(f"{path} cannot be written: {exc.strerror}") from exc
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        os.unlink(name)
        raise Invalid(f"{path} cannot be written: {exc.strerror}") from exc
    return Path(name)


def sync_folder(folder: Path) -> None:
    """Make the names in this folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
