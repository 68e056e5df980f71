"""The end of a command: errors in a line or two, Ctrl-C without a word, processes of torchrun that do not abort."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from runtime.failure import explain

DEBUG = "--debug"
"""The option of every command that shows the traceback of an error."""
FAILED = 2
"""The exit status after an error that was explained."""


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt) or DEBUG in sys.argv:
        sys.__excepthook__(kind, error, trace)


# At the import of this module, which comes first in every command: the other imports take seconds, and Ctrl-C may
# interrupt them. Python still ends the process by the signal.
sys.excepthook = _quiet


@contextlib.contextmanager
def sound_ending() -> Iterator[None]:
    """Around everything that a command does: say what went wrong, and end with the right exit status.

    An error that `explain` knows is printed in a line or two, once for all processes of torchrun, and the exit status
    is 2; with --debug, and for any other error, it is Python's traceback and 1.

    A process of torchrun ends with its own exit status and never aborts. Python finalises itself after the block and
    after all exit handlers. A process of gloo may abort there, after its work: DDP and FSDP2 keep references to the
    group, so that `destroy_process_group` stops none of its threads, and PyTorch does not survive a thread that needs
    the interpreter at that time (pytorch#190489, #179291). Therefore the process ends as soon as the exit handlers have
    run that were registered inside the block.
    """
    status = 1  # of an exception, whose traceback Python prints before it calls exit handlers

    def end() -> None:
        try:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    if "RANK" in os.environ:  # started by torchrun
        atexit.register(end)  # the first one in the block, and so the last one that is called
    try:
        yield
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        raise
    except Exception as error:
        message = explain(error)
        if message is None or DEBUG in sys.argv:
            raise
        status = FAILED
        _say_once(f"{Path(sys.argv[0]).name}: error: {message}")
        sys.exit(status)


def _say_once(line: str) -> None:
    """Print the line to stderr, unless another process of the same torchrun has printed it."""
    address = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    if "RANK" not in os.environ or not all(address):
        print(line, file=sys.stderr, flush=True)
        return
    from torch.distributed import TCPStore  # imported here because a command that fails early has not needed torch yet

    said = f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {line}"
    try:
        # The store of torchrun's own agent, which is there before and after the group of the processes.
        store = TCPStore(address[0], int(address[1]), is_master=False, timeout=timedelta(seconds=5))
        if store.add(f"{said}, by", 1) > 1:
            store.wait([said], timedelta(seconds=5))  # the first process to end makes torchrun stop the others
            return
    except (RuntimeError, ValueError):  # no such store, or the first one died before it said anything
        store = None
    print(line, file=sys.stderr, flush=True)
    if store is not None:
        store.set(said, "")
