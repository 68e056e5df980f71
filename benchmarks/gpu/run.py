"""Runs each stage in a process of its own, for a limited time, and says in the end what became of all of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.job import ROOT
from benchmarks.gpu.stages import STAGES, seconds

LAST_SECONDS = 20
"""A stage begins nothing more when so many are left of its time, or a quarter of it: what it is at has to end."""


class Outcome(NamedTuple):
    """How a stage ended: "ran", "failed", "stopped" or "interrupted", and after how many seconds."""

    name: str
    state: str
    seconds: float


def run_all(device: str, root: Path) -> int:
    """Run every stage there is on `device`; returns the exit code, 1 if one failed or was stopped."""
    names = [name for name in STAGES if seconds(name, device)]
    started = time.time()
    end = time.monotonic() + sum(seconds(name, device) for name in names)
    outcomes = []
    for index, name in enumerate(names):
        later = sum(seconds(other, device) for other in names[index + 1 :])
        limit = max(end - time.monotonic() - later, seconds(name, device))
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks", "gpu", "--device", device, "--output", str(root)]
        outcomes.append(run_stage(name, [*command, "--only", name, "--seconds", f"{time_to_begin(limit):.0f}"], limit))
        if outcomes[-1].state == "interrupted":
            break
    print("\n" + summary(outcomes, root, started), flush=True)
    return int(any(outcome.state != "ran" for outcome in outcomes))


def time_to_begin(limit: float) -> float:
    """After how many seconds a stage that is stopped after `limit` begins nothing more."""
    return limit - min(LAST_SECONDS, limit / 4)


def run_stage(name: str, command: list[str], limit: float) -> Outcome:
    """Run `command` in the repository for at most `limit` seconds; all processes that it starts end with it."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        state = "ran" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        state = "stopped"
    except KeyboardInterrupt:
        state = "interrupted"
    finally:  # what a stage has started itself, such as compilers, is in its session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may not let go of its process
            process.wait(10)
    return Outcome(name, state, time.monotonic() - started)


def summary(outcomes: list[Outcome], root: Path, started: float) -> str:
    """Every stage and how it ended; the files written since `started`, and what failed by them."""
    words = {
        "ran": "ran",
        "failed": "FAILED, as its output above says",
        "stopped": "STOPPED at its limit",
        "interrupted": "INTERRUPTED",
    }
    lines = ["== Summary"]
    lines += [f"{outcome.name}: {outcome.seconds:.0f} s, {words[outcome.state]}" for outcome in outcomes]
    folders = (root / "benchmarks" / "results", root / "docs", root / "docs" / "images")
    written = [path for folder in folders for path in sorted(folder.glob("*.*")) if path.stat().st_mtime >= started]
    lines.append("Files:" if written else "No file was written.")
    for path in written:
        lines.append(f"  {path}")
        if path.suffix == ".json":
            lines += [f"    {line}" for line in what_happened(json.loads(path.read_text()))]
    return "\n".join(lines)


def what_happened(result: dict) -> list[str]:
    """What a result file says of tests, cases and contenders: how many there are, and what failed."""
    rows, lines = result["rows"], []
    if result["benchmark"] == "tests":
        lines.append(", ".join(f"{count} {outcome}" for outcome, count in sorted(result["counts"].items())))
        lines += [row["test"] for row in rows if row["outcome"] == "failed"]
        if not result["complete"]:
            lines.append("no time was left for the other tests")
    else:
        lines.append(f"{len(rows)} rows")
    if "cases" in result:
        cases = len({(row["size"], row["start"]) for row in rows})
        lines.append(f"{cases} of {result['cases']} cases")
    lines += result.get("failed", [])
    lines += [f"{row['contender']}, {row['size']}: {row['missing']}" for row in rows if "missing" in row]
    return lines
