"""What a reader of files must never do: run a program, use the network, or touch a file outside its folder."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_RUNS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "os.startfile",
)
_NETWORK = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
_WRITES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hangs(BaseException):
    """A reader did not end in time. It is no Exception, so that no reader can take it for one of its own."""


class Watch:
    """Notes what a reader does that it must not, by Python's audit events.

    Args:
        inside: the only folder in which it may write.
        outside: a folder that it must not even read, though paths in hostile files point to it.
    """

    def __init__(self, inside: Path, outside: Path) -> None:
        self.inside, self.outside = str(inside.resolve()), str(outside.resolve())
        self.seen: list[str] = []
        self._on = False
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self, seconds: int) -> Iterator[list[str]]:
        """Give the list of what is seen inside the block; raise Hangs in it after some seconds of processor time."""
        self.seen = []
        previous = signal.signal(signal.SIGPROF, _stop)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        self._on = True
        try:
            yield self.seen
        finally:
            self._on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _RUNS:
            self.seen.append(f"executed {event}{arguments[:2]}")
        elif event in _NETWORK:
            self.seen.append(f"used the network: {event}{arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            self._opened(os.fsdecode(arguments[0]), arguments[2] or 0)
        elif event in _WRITES and isinstance(arguments[0], str | bytes):
            self._written(os.fsdecode(arguments[0]))

    def _opened(self, path: str, flags: int) -> None:
        self._on = False  # what is done here is not watched
        if _within(path, self.outside):
            self.seen.append(f"left its folder: opened {path}")
        self._on = True
        if flags & _WRITE_FLAGS:
            self._written(path)

    def _written(self, path: str) -> None:
        self._on = False
        if not _within(path, self.inside) and not _within(path, "/dev"):
            self.seen.append(f"left its folder: wrote {path}")
        self._on = True


def _within(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def _stop(_signum: int, _frame: FrameType | None) -> None:
    raise Hangs
