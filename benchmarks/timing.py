"""Timing of several contenders against each other on a machine that others may be using."""

import time
from collections.abc import Callable
from statistics import median

import torch
from tqdm import tqdm


def interleaved_medians(
    contenders: dict[str, Callable[[], object]], *, rounds: int = 7, seconds: float = 0.05, device: str = "cpu"
) -> dict[str, float]:
    """Seconds per call of each contender: the median over `rounds` in which all take turns.

    Taking turns lets a slow spell of the machine hit everybody; a turn repeats the call for at least `seconds`.
    """
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    repeats = {}
    for name, call in tqdm(contenders.items(), desc="warming up", leave=False):
        call()  # compiles
        repeats[name] = max(1, round(seconds / _seconds_per_call(call, 1, synchronize)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="timing", leave=False):
        for name, call in contenders.items():
            samples[name].append(_seconds_per_call(call, repeats[name], synchronize))
    return {name: median(values) for name, values in samples.items()}


def _seconds_per_call(call: Callable[[], object], repeats: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def _nothing() -> None:
    pass
