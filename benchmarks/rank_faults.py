"""`python -m benchmarks rank-faults`: one of two ranks fails, and the time until torchrun and all ranks have ended."""

import dataclasses
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import results

PRETRAIN = Path(__file__).parents[1] / "examples" / "vit_ssl" / "pretrain.py"
RANKS = 2
FAULTS = {
    "explained": "raises an OSError, which the command explains in a line",
    "defect": "raises a TypeError, whose traceback is printed",
    "killed": "is killed with SIGKILL",
    "loader killed": "loses a loader process to SIGKILL",
}
CAUSE = "the cause of it all"
LAST_STEP = 40  # a fault strikes in this step or an earlier one; an epoch has 33
SIZE = ("dataset=digits", "batch_size=32", "epochs=100", "warmup_epochs=0", "teacher_temp_warmup_epochs=1", "lr=0.01")
SIZE += ("hidden_size=16", "num_attention_heads=2", "num_hidden_layers=2", "out_dim=32", "hidden_dim=16")
SIZE += ("bottleneck_dim=8", "image_size=16", "local_size=8", "num_local_crops=1", "precision=float32")

# torchrun starts this file in place of pretrain.py, which it runs with a fault in one step of one rank.
PROGRAM = f"""
import multiprocessing, os, pathlib, runpy, signal, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook

folder, fault, rank, step = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
del sys.argv[1:5]
(folder / os.environ["RANK"]).write_text(str(os.getpid()))
steps = []

def fail(*_):
    steps.append(1)
    if len(steps) != step or os.environ["RANK"] != rank:
        return
    (folder / "began").write_text(str(time.monotonic()))
    if fault == "explained":
        raise OSError({CAUSE!r})
    if fault == "defect":
        raise TypeError({CAUSE!r})
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

register_optimizer_step_post_hook(fail)
runpy.run_path({str(PRETRAIN)!r}, run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class Ending:
    """How torchrun ended after a rank had failed.

    `seconds` passed between the fault and the end of torchrun, `seconds_to_all` until no process that it had started
    was left, loader processes included. `left` are the numbers of ranks that still lived when torchrun had ended.
    """

    exit_status: int
    seconds: float
    seconds_to_all: float
    left: list[int]
    stderr: str

    @property
    def first_error(self) -> str:
        """The first line of stderr that tells of an error; of a traceback that is its last line."""
        lines = self.stderr.splitlines()
        return next((line for line in lines if re.search("error: |failed", line, re.IGNORECASE)), "")


def rank_faults(*, repetitions: int = 5, seed: int = 0) -> None:
    """Let one of two ranks fail in every way, and measure the time until torchrun has ended.

    Prints a table and writes benchmarks/results/rank_faults_cpu_*.json; the exit status is 1 if torchrun ended with
    status 0, left a rank behind, or if another error was printed before the cause.

    Args:
        repetitions: how many failures of each kind.
        seed: of the ranks and steps that fail.
    """
    if repetitions < 1:
        raise ValueError(f"`repetitions` (={repetitions}) must be at least 1")
    torch.set_num_threads(1)
    rng, broken, rows = random.Random(seed), [], []
    for fault in FAULTS:
        endings = []
        for _ in range(repetitions):
            rank, step = rng.randrange(RANKS), rng.randint(1, LAST_STEP)
            with tempfile.TemporaryDirectory() as folder:
                endings.append(ending := ending_after(fault, rank, step, Path(folder)))
            where = f"{fault} in rank {rank} at step {step}"
            broken += [f"{where}: {sentence}" for sentence in broken_promises(fault, ending)]
        rows.append(_row(fault, endings))
    print(table(rows))
    print(results.write("rank_faults", "cpu", rows, ranks=RANKS, repetitions=repetitions, seed=seed, broken=broken))
    if broken:
        sys.exit("\n".join(broken))


def ending_after(fault: str, rank: int, step: int, folder: Path, *, seconds: float = 600) -> Ending:
    """Start a run of two ranks in an empty folder, one of which fails in a step, and wait for its end.

    Args:
        fault: one of `FAULTS`.
        rank: the rank that fails, 0 or 1.
        step: in which it fails, counted from 1.
        folder: where the run and the notes of its ranks are.
        seconds: after so many seconds the run is ended.

    Raises:
        TimeoutError: torchrun or one of its processes still ran after `seconds`.
    """
    (program := folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += [str(program), str(folder), fault, str(rank), str(step), "--recipe", "photos_dino_vmf"]
    command += ["--output", str(folder / "run"), "--num-workers", "2", "--collapse-window", "0", "--set", *SIZE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PRETRAIN.parent)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        exit_status = process.wait(seconds)  # what is printed, some 10 kB, fits into the pipe
        ended = time.monotonic()
        left = [pid for pid in _ranks(folder) if _is_alive(pid)]
        # The pipe ends when the last process that inherited it has ended.
        stderr = process.communicate(timeout=seconds)[1]
        all_ended = time.monotonic()
    except subprocess.TimeoutExpired as error:
        when = "after" if (folder / "began").exists() else "before"
        raise TimeoutError(
            f"{fault}: torchrun ran for more than {seconds} seconds, and hangs {when} the fault"
        ) from error
    finally:
        for pid in [process.pid] * (process.poll() is None) + [pid for pid in _ranks(folder) if _is_alive(pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()
    began = float((folder / "began").read_text())
    return Ending(exit_status, ended - began, all_ended - began, left, stderr)


def broken_promises(fault: str, ending: Ending) -> list[str]:
    """Say which promises the ending breaks: a status other than 0, no rank left, the cause first."""
    broken = []
    if ending.exit_status == 0:
        broken.append("torchrun ended with status 0")
    if ending.left:
        broken.append(f"ranks {ending.left} were left")
    expected = {
        "explained": f"pretrain.py: error: {CAUSE}",
        "defect": f"TypeError: {CAUSE}",
        "killed": "another process of this command ended",  # the one that was killed says nothing
        "loader killed": "Often the memory ran out: use fewer --num-workers",
    }[fault]
    if expected not in ending.first_error:
        broken.append(f"the first error is {ending.first_error!r}, not {expected!r}")
    return broken


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| a rank … | times | torchrun had ended within: median | longest | and every loader process |"]
    lines += ["|---|---|---|---|---|"]
    for row in rows:
        times = " | ".join(f"{row[name]:.1f} s" for name in ("median_s", "longest_s", "longest_to_all_s"))
        lines.append(f"| {FAULTS[row['fault']]} | {row['times']} | {times} |")
    return "\n".join(lines)


def _row(fault: str, endings: list[Ending]) -> dict[str, Any]:
    seconds = [ending.seconds for ending in endings]
    return {
        "fault": fault,
        "times": len(endings),
        "median_s": round(statistics.median(seconds), 2),
        "longest_s": round(max(seconds), 2),
        "longest_to_all_s": round(max(ending.seconds_to_all for ending in endings), 2),
    }


def _ranks(folder: Path) -> list[int]:
    return [int(path.read_text()) for rank in range(RANKS) if (path := folder / str(rank)).exists()]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
