"""What the errors of a command say to the person at the terminal: a line or two, without a traceback."""

from __future__ import annotations

import errno
import re
import traceback

_NO_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
_LOADER_DIED = re.compile(r"DataLoader worker .* (is killed by signal|exited unexpectedly)")
_LOADER_ENDED = "{}. Often the memory ran out: use fewer --num-workers; pretrain.py continues with --resume"
_OTHER_PROCESS_LEFT = re.compile("Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused")


class Failure(RuntimeError):
    """The work failed, not the program: the message says all that there is to know."""


def explain(error: Exception) -> str | None:
    """Return what is wrong and what to do about it; None for an error of the program, which needs its traceback.

    Bad input (ValueError), files (OSError), packages that are not installed (ImportError), a training that went wrong
    (FloatingPointError, Failure), too little memory, loader processes and other ranks that ended are explained.
    """
    text = str(error) or type(error).__name__
    if text.startswith("Caught ") and "Traceback" in text:  # of a loader process, in whose message its traceback is
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    first = text.splitlines()[0]
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return f"not enough memory ({first}): use smaller batches, or more micro-batches (--accumulate) of pretrain.py"
    if isinstance(error, RuntimeError) and _LOADER_DIED.search(text):
        return _LOADER_ENDED.format(first.rstrip(" ."))
    if _in_transport(error):
        return _LOADER_ENDED.format(f"a loader process ended ({first})")
    if isinstance(error, RuntimeError) and _OTHER_PROCESS_LEFT.search(text):
        return "another process of this command ended: what it said, or else what torchrun says of it, is the cause"
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
        return f"{text}; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else text
    told = (ValueError, OSError, ImportError, FloatingPointError, Failure)
    return text if isinstance(error, told) else None


def _in_transport(error: Exception) -> bool:
    """Return whether it came up where a process takes over a batch, which the loader process must still hold then."""
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return bool(modules & {"multiprocessing.connection", "multiprocessing.reduction"})
