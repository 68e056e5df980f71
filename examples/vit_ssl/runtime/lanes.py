"""Several chains of commands side by side, with one progress line each, on a terminal and in a log file alike."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from runtime.failure import Failure
from runtime.interruption import postponed_signals


@dataclasses.dataclass(frozen=True)
class Job:
    """One command; its output goes to the end of `log`. With `metrics`, a JSONL file, its progress is shown."""

    title: str
    command: Sequence[str]
    log: Path
    metrics: Path | None = None
    steps: int = 0  # of the whole job, including those done before it was resumed


class JobFailed(Failure):
    """A command ended with an error; the message holds what it said about it, or the end of its output."""


class _Lane:
    def __init__(self, label: str, jobs: Sequence[Job]) -> None:
        self.label, self.waiting, self.process = label, list(jobs), None
        self.began = time.monotonic()
        self.start_next()

    def start_next(self) -> bool:
        if not self.waiting:
            return False
        self.job = self.waiting.pop(0)
        self.job_began, self.first_step = time.monotonic(), last_row(self.job.metrics).get("step", 0)
        # Each has one thread, because more would fight over the cores, and a session of its own, so that Ctrl-C reaches
        # it through us only.
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.job.log.parent.mkdir(parents=True, exist_ok=True)
        with self.job.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        return True

    def advance(self) -> bool:
        """Return whether anything still runs; raise JobFailed if the command ended with an error."""
        code = self.process.poll()
        if code is None:
            return True
        if code:
            raise JobFailed(f"{self.label}, {self.job.title}: exit status {code}; {_reason(self.job.log)}")
        if self.start_next():
            return True
        self.done = time.monotonic() - self.began
        return False

    def line(self, width: int) -> str:
        elapsed = time.monotonic() - self.job_began
        if self.process.poll() is not None and not self.waiting:
            return f"{self.label}: done"
        row = last_row(self.job.metrics)
        if not row:
            return f"{self.label}: {self.job.title}, {elapsed:.0f} s"
        # This is tqdm's own line, so that speed and remaining time are of this start, not of the steps before it.
        return tqdm.format_meter(
            row["step"], self.job.steps, elapsed, ncols=width, prefix=f"{self.label}: {self.job.title}",
            initial=self.first_step, unit="step", postfix=f"loss {row['loss']:.3f}",
        )  # fmt: skip


def run_lanes(lanes: Mapping[str, Sequence[Job]], *, stream: TextIO = sys.stderr, log_seconds: float = 10) -> None:
    """Run the jobs of each lane one after another and the lanes in parallel.

    On a terminal one line per lane is kept up to date; elsewhere (a CI log) the lines are printed every `log_seconds`.
    SIGTERM and Ctrl-C are passed on to the running commands as SIGTERM and waited for; then SystemExit(128 + signal).

    Raises:
        JobFailed: a command ended with an error. The other lanes are stopped first, in the same way.
    """
    terminal = stream.isatty()
    width = min(os.get_terminal_size(stream.fileno()).columns - 1, 110) if terminal else 100
    with postponed_signals() as received:
        running = [_Lane(label, jobs) for label, jobs in lanes.items() if jobs]
        everyone, shown = list(running), 0.0
        if terminal:
            stream.write("\n" * len(everyone))
        try:
            while running and not received:
                time.sleep(0.1)
                running = [lane for lane in running if lane.advance()]
                if time.monotonic() - shown >= (0.5 if terminal else log_seconds) or not running:
                    shown = time.monotonic()
                    lines = [lane.line(width)[:width] for lane in everyone]
                    clear = "\x1b[2K" if terminal else ""
                    up = f"\x1b[{len(lines)}A" if terminal else ""
                    stream.write(up + "".join(f"{clear}{line}\n" for line in lines))
                    stream.flush()
        finally:
            for lane in everyone:
                if lane.process.poll() is None:
                    lane.process.send_signal(signal.SIGTERM)
            for lane in everyone:
                lane.process.wait()
        if received:
            sys.exit(128 + received[0])


def _reason(log: Path) -> str:
    last = log.read_text(errors="replace").splitlines()[-15:]
    told = next((number for number, line in enumerate(last) if ": error: " in line), None)
    if told is not None:  # by `sound_ending`
        return "\n".join([*last[told:], f"(from {log})"])
    return "\n".join([f"the end of {log}:", *last])


def last_row(path: Path | None) -> dict[str, Any]:
    """Return the last whole row of a JSONL file that may still be written to; {} when there is none."""
    if path is None or not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is not finished
    return json.loads(lines[-1]) if lines else {}
