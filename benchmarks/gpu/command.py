"""`python -m benchmarks gpu`: tests, benchmarks, figures and tables of a GPU, in one command."""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.job import REHEARSAL, ROOT, Job
from benchmarks.gpu.run import run_all, time_to_begin
from benchmarks.gpu.stages import STAGES, seconds

DESCRIPTION = """
Run the cases of the tests that are for a GPU, then the benchmarks of loss, normaliser and training step on it, and put
the results into benchmarks/results, docs/images and the tables of docs. It takes at most ten minutes, stage by stage,
each in a process of its own; the summary at the end names what failed and every file. It needs Python with torch,
numpy, scipy, mpmath, matplotlib, pytest and hypothesis; vmf_heads need not be installed: PYTHONPATH=src will do.
"""


def main(arguments: list[str]) -> int:
    """Run the command with these arguments; returns its exit code, 1 if anything failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a rehearsal with tiny sizes, whose files go to runs/gpu_rehearsal (default: cuda)",
    )
    parser.add_argument("--output", type=Path, help="where the files go, laid out as in the repository, the default")
    parser.add_argument("--only", choices=tuple(STAGES), help="one stage alone, in this process")
    parser.add_argument("--seconds", type=float, help="when `--only` begins nothing more (default: its share)")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and given.only != "docs" and not torch.cuda.is_available():
        parser.error("`--device` (=cuda) needs a GPU that torch sees; `--device cpu` rehearses without one")
    root = (given.output or (ROOT if given.device == "cuda" else REHEARSAL)).resolve()
    if given.only is None:
        return run_all(given.device, root)
    left = given.seconds if given.seconds is not None else time_to_begin(seconds(given.only, given.device))
    return run_one(given.only, Job(given.device, root, time.monotonic() + left))


def run_one(name: str, job: Job) -> int:
    """Run a stage in this process; returns its exit code."""
    failed = STAGES[name].run(job)
    for each in failed:
        print(f"FAILED: {each}", file=sys.stderr)
    return int(bool(failed))
