"""Seconds and bytes of every contender at every size."""

import contextlib
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.loss import attention, contenders, peers
from benchmarks.loss.inputs import Inputs, Size
from benchmarks.loss.memory import peak
from benchmarks.loss.work import work
from benchmarks.timing import interleaved_medians

BATCHES = {"cpu": (4, 8, 16, 32, 64), "cuda": (16, 32, 64, 128, 256)}
EAGER = (contenders.PLAIN, contenders.UNFUSED, contenders.FUSED)  # no operation of theirs is hidden in a kernel
STARTS = {False: "from the prototypes", True: "from the head's parameters"}

Rows = list[dict[str, Any]]


def measure(sizes: list[Size], device: str, *, autocast: bool, quick: bool) -> Rows:
    """One row per size, start and contender; extra memory is what a step needs above parameters and all gradients."""
    rows: Rows = []
    for size in sizes:
        for weight_norm in STARTS:
            if size.brief and not weight_norm:
                continue
            inputs = Inputs(size, device, weight_norm=weight_norm)
            calls, missing = _contenders(inputs, autocast=autocast)
            steps = {name: partial(_step, call, inputs, autocast) for name, call in calls.items()}
            timed: dict[str, Callable[[], object]] = dict(steps)
            timed |= {f"{name}, forward": partial(_forward, call, inputs, autocast) for name, call in calls.items()}
            timed[contenders.PRODUCTS] = partial(_floor, inputs, autocast)
            seconds = interleaved_medians(
                timed, rounds=3 if quick else 5 if size.brief else 7, seconds=0.0 if quick else 0.05, device=device
            )
            for name, step in steps.items():
                rows.append(
                    _labels(size, weight_norm, name)
                    | {"forward_s": seconds[f"{name}, forward"], "step_s": seconds[name]}
                    | _memory(step, partial(_forward, calls[name], inputs, autocast), inputs, device)
                    | (work(step) if name in EAGER else {})
                )
            floor = {"step_s": seconds[contenders.PRODUCTS]} | work(timed[contenders.PRODUCTS])
            rows.append(_labels(size, weight_norm, contenders.PRODUCTS) | floor)
            rows += [_labels(size, weight_norm, name) | {"missing": why} for name, why in missing.items()]
    return [{key: _short(value) for key, value in row.items()} for row in rows]


def memory_by_batch(device: str, *, autocast: bool) -> Rows:
    """Extra memory of 10 crops and K = 65 536 against the number of images, from the head's parameters."""
    rows: Rows = []
    for images in tqdm(BATCHES[device], desc="memory by batch"):
        size = Size("", 10, images, 65536)
        inputs = Inputs(size, device, weight_norm=True)
        for name, call in {contenders.PLAIN: contenders.plain, contenders.FUSED: contenders.fused}.items():
            forward = partial(_forward, call, inputs, autocast)
            memory = _memory(partial(_step, call, inputs, autocast), forward, inputs, device)
            rows.append({"contender": name, "images": images, "extra_bytes": memory["extra_bytes"]})
    return rows


def _contenders(inputs: Inputs, *, autocast: bool) -> tuple[dict[str, contenders.Contender], dict[str, str]]:
    """(losses by name, why the others are missing by name)."""
    calls: dict[str, contenders.Contender] = {contenders.PLAIN: contenders.plain}
    missing: dict[str, str] = {}
    if inputs.size.brief:
        return calls | {contenders.FUSED: contenders.fused}, missing
    calls |= {
        contenders.COMPILED: torch.compile(contenders.plain, dynamic=False),
        contenders.UNFUSED: contenders.unfused,
        contenders.FUSED: contenders.fused,
    }
    if inputs.y.is_cuda:
        calls[contenders.FLEX] = partial(attention.by_attention, attention=attention.flex)
        calls[contenders.SDPA] = partial(attention.by_attention, attention=attention.sdpa)
    if not inputs.weight_norm:
        found, missing = peers.available(inputs.size)
        calls |= found
    for name in set(calls) - {contenders.PLAIN, contenders.FUSED}:
        try:
            _step(calls[name], inputs, autocast)
        except Exception as error:  # a kernel that does not take this size, a compiler that is not there, no memory
            missing[name] = f"failed ({type(error).__name__}: {str(error).splitlines()[0]})"
            del calls[name]
    return calls, missing


def _memory(step: Callable[[], object], forward: Callable[[], object], inputs: Inputs, device: str) -> dict[str, Any]:
    """Peaks of a forward pass, whose graph is kept, and of a step, less the gradients that the step leaves behind."""
    peaks = {}
    for name, call in (("forward_peak_bytes", forward), ("step_peak_bytes", step)):
        _clear(inputs)
        gc.collect()
        peaks[name] = peak(call, device)
    gradients = sum(leaf.grad.nbytes for leaf in inputs.leaves if leaf.grad is not None)
    return peaks | {"extra_bytes": max(peaks.values()) - gradients}


def _step(call: contenders.Contender, inputs: Inputs, autocast: bool) -> None:
    _clear(inputs)
    _forward(call, inputs, autocast).backward()


def _forward(call: contenders.Contender, inputs: Inputs, autocast: bool) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext():
        return call(inputs)


def _floor(inputs: Inputs, autocast: bool) -> None:
    with torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext():
        contenders.products(inputs)


def _clear(inputs: Inputs) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None


def _labels(size: Size, weight_norm: bool, name: str) -> dict[str, Any]:
    return {"size": str(size), "start": STARTS[weight_norm], "contender": name}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
