"""One process at a time writes into a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

LOCK = ".lock"


class FolderInUse(OSError):
    """Another process writes into the folder; the message says which one."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the only lock of a folder, which is made where there is none; an empty one is removed afterwards.

    The lock is the operating system's, on FOLDER/.lock, and ends with the process, however that ends: a file that
    a killed process left behind locks nothing. Children do not share it. It holds between machines where the file
    system has such locks (NFS 4, Lustre with -o flock); where there are none at all, a line on stderr says so.

    Raises:
        FolderInUse: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    number = _acquire(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock ends, so that nobody can hold it under a name that is gone
        os.close(number)
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing was written


def _acquire(path: Path) -> int:
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # POSIX locks, unlike flock's, are not inherited: loader processes that outlive a killed one hold nothing.
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(number, 200).decode(errors="replace").strip()
            os.close(number)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                reason = f"{path.parent} cannot be locked here ({error.strerror})"
                print(f"{reason}: start no second process that writes there", file=sys.stderr)
                return os.open(os.devnull, os.O_RDONLY)
            raise FolderInUse(
                f"`output` (={str(path.parent)!r}) is being written by {holder or 'another process'}: wait for its "
                "end, or choose another"
            ) from None
        # Another process may have ended, and removed the file, since it was opened: then this lock is of no file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), path.stat()):
                since = datetime.now(timezone.utc).isoformat(timespec="seconds")
                os.ftruncate(number, 0)
                os.write(number, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
                return number
        os.close(number)
