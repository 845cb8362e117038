"""One process per folder: a second one is refused, so that two never write over each other's files.

The folder itself is locked. The package filelock locks a file and leaves it there, so that a folder would never be
empty again, and one that holds other files is nobody's to prepare.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fibattn.errors import InputError


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder, made if need be, for this process alone; yields False when another process holds it.

    The lock ends with the process, however that ends. A folder that was made for it and is still empty in the end is
    removed. On a file system that cannot lock a folder (NFS is one) every process gets it.

    Raises:
        InputError: when `folder` is a file, or lies in one.
    """
    new = not folder.exists()
    descriptor = _held(folder)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        if new:
            with suppress(OSError):
                folder.rmdir()
        # Child processes of a failed one may still hold the folder open, so closing it would not release the lock.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _held(folder: Path) -> int | None:
    """A descriptor that holds the lock on the folder, None when another process has it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{folder} is no folder, or lies in a file; give another place") from None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it just now
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        os.close(descriptor)
