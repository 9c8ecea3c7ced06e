"""Files that are there as a whole or not at all."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path


class WriteError(OSError):
    """A file that can't be written; the message names it and says what is missing."""


def sync_to_disk(path: Path) -> None:
    """Returns when the file or folder (its names) is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` holds all of it or what it held before, whatever happens meanwhile.

    One writer at a time: that they take turns is their callers' business.

    Raises:
        WriteError: the disk is full or can't be written to; `path` is as before.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_to_disk(path.parent)
    except OSError as e:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            partial.unlink(missing_ok=True)
        reason = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else e.strerror
        raise WriteError(f"can't write {path}: {reason}; {len(data) / 1e6:.1f} MB are needed") from e


def sha256(path: Path) -> str:
    """The file's digest, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
