"""The stages of `python -m benchmarks gpu`, in their order: what is worth most comes first."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.gpu import cuda_tests, losses, normalizer, report, training_step
from benchmarks.gpu.job import Job


class Stage(NamedTuple):
    """What it does, and how many seconds it may take on a GPU and, in a rehearsal, on a CPU; 0 leaves it out there."""

    run: Callable[[Job], list[str]]
    cuda_seconds: int
    cpu_seconds: int


STAGES = {
    "tests": Stage(cuda_tests.run, 145, 40),
    "loss-bfloat16": Stage(partial(losses.run, dtype="bfloat16"), 170, 0),
    "loss-float32": Stage(partial(losses.run, dtype="float32"), 80, 60),
    "chunks": Stage(losses.run_chunks, 40, 30),
    "normalizer": Stage(normalizer.run, 70, 30),
    "step": Stage(training_step.run, 60, 30),
    "docs": Stage(report.run, 20, 30),
}
"""Together at most ten minutes. What one does not use is left to those after it."""


def seconds(name: str, device: str) -> int:
    """The share of a stage on a device."""
    stage = STAGES[name]
    return stage.cuda_seconds if device == "cuda" else stage.cpu_seconds
