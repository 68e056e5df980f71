"""The end of a command that torchrun started."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def sound_ending() -> Iterator[None]:
    """Around everything that a command does: a process of torchrun ends with its own exit status and never aborts.

    Python finalises itself after the block and after all exit handlers. A process of gloo may abort there, after its
    work: DDP and FSDP2 keep references to the group, so that `destroy_process_group` stops none of its threads, and
    PyTorch does not survive a thread that needs the interpreter at that time (pytorch#190489, #179291). Therefore the
    process ends as soon as the exit handlers have run that were registered inside the block.
    """
    if "RANK" not in os.environ:  # started without torchrun
        yield
        return
    status = 1  # of an exception, whose traceback Python prints before it calls exit handlers

    def end() -> None:
        try:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

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
