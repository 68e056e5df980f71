"""SIGTERM and Ctrl-C take effect at a moment that the program chooses."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def postponed_signals(*, ignore_repeats: bool = False) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying in the middle of a step.

    A second one has its usual effect, unless `ignore_repeats`: a process of torchrun may get the same one from the
    terminal or the batch system and from torchrun, which ends with SIGKILL what does not stop within 30 seconds.
    """
    received: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        if not ignore_repeats:
            signal.signal(signum, previous[signum])

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def leave_process_group(_worker: int) -> None:
    """Put a loader process into a group of its own, so that a signal to the whole group does not end it.

    The training process needs it to finish the step, and ends it then; one whose parent has died ends by itself.
    """
    os.setpgrp()
