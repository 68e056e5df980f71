"""Timing of several contenders against each other on a machine that others may be using."""

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.progress import progress


def interleaved_medians(
    contenders: dict[str, Callable[[], object]], *, rounds: int = 7, seconds: float = 0.05, device: str = "cpu"
) -> dict[str, float]:
    """Seconds per call of each contender: the median over `rounds` in which all take turns.

    Taking turns lets a slow spell of the machine hit everybody; a turn repeats the call for at least `seconds`. On CUDA
    the times are those between two events on the GPU.
    """
    seconds_per_call = _on_cuda if device.startswith("cuda") else _on_cpu
    repeats = {}
    for name, call in progress(contenders.items(), desc="warming up", leave=False):
        call()  # compiles
        repeats[name] = max(1, round(seconds / seconds_per_call(call, 1)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in progress(range(rounds), desc="timing", leave=False):
        for name, call in contenders.items():
            samples[name].append(seconds_per_call(call, repeats[name]))
    return {name: median(values) for name, values in samples.items()}


def _on_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _on_cuda(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
