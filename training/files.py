"""Files and folders that are whole or not there: written under a hidden name, then renamed.

A run that is killed at any moment leaves the old file or the new one under its name, never a part; what it leaves under hidden
names, the next run removes. A full disk or a read-only folder is one error that says so, and what was there stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def unwritten(path: Path) -> Iterator[Path]:
    """The hidden name of a file or a folder, renamed if the block ends well, removed if not.

    Raises:
        OSError: If it cannot be written: no space, no permission, a broken disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with removed_if_not_whole(temporary, path):
        yield temporary
        flush(temporary)
        if path.is_dir() and temporary.is_dir():
            remove(path)  # a folder cannot be renamed onto another one
        os.replace(temporary, path)


@contextmanager
def published(folder: Path, last: str) -> Iterator[Path]:
    """A hidden folder whose files move into `folder`, one by one, if the block ends well. The file `last` makes it complete:
    an old one goes before the others change, the new one comes after them.

    Raises:
        OSError: If they cannot be written.
    """
    temporary = folder / ".published.tmp"
    with removed_if_not_whole(temporary, folder):
        temporary.mkdir()
        yield temporary
        flush(temporary)
        (folder / last).unlink(missing_ok=True)
        found = [file for file in temporary.rglob("*") if file.is_file()]
        for file in sorted(found, key=lambda file: file == temporary / last):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        shutil.rmtree(temporary)


@contextmanager
def removed_if_not_whole(temporary: Path, path: Path) -> Iterator[None]:
    """Begin without `temporary`, and leave none behind; what the system says of it becomes an error that names `path`."""
    try:
        remove(temporary)
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"{path} could not be written: {reason}. What was written before is whole") from error


def write_text(path: Path, text: str) -> None:
    """The file, whole or as it was before.

    Raises:
        OSError: If it cannot be written.
    """
    with unwritten(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk: some disks say only now that they are full."""
    for file in [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """A file or a folder, which loses its name before it loses its contents; nothing where there is none.

    Raises:
        OSError: If it cannot be removed, as on a disk that can only be read.
    """
    leaving = path.with_name(f".{path.name}.old.tmp")
    try:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(path, leaving)
    except OSError as error:
        raise OSError(f"{path} could not be removed: {error.strerror or error}") from error
    shutil.rmtree(leaving, ignore_errors=True)


def output_folder(path: Path) -> None:
    """Make the folder, see that it can be written, and remove what a killed run left in it under hidden names.

    Raises:
        OSError: If it cannot be made or written.
    """
    probe = path / ".writable.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        for left in path.glob(".*.tmp"):
            remove(left)
    except OSError as error:
        raise OSError(f"`--output_dir` {path} cannot be written: {error.strerror or error}") from error
