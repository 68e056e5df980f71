"""Seconds and bytes of every contender at every size."""

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from benchmarks.loss import attention, chunked, contenders, peers
from benchmarks.loss.inputs import Inputs, Size
from benchmarks.loss.memory import peak
from benchmarks.loss.work import work
from benchmarks.progress import progress
from benchmarks.timing import interleaved_medians

BATCHES = {"cpu": (4, 8, 16, 32, 64), "cuda": (16, 32, 64, 128, 256)}
# No operation of theirs is hidden in a kernel.
EAGER = (contenders.PLAIN, contenders.UNFUSED, contenders.FUSED, contenders.PRODUCTS)
STARTS = {False: "from the prototypes", True: "from the head's parameters"}

Rows = list[dict[str, Any]]


def measure(sizes: list[Size], device: str, *, autocast: bool, quick: bool) -> Rows:
    """One row per size, start and contender; extra memory is what a step needs above parameters and all gradients."""
    rows: Rows = []
    for size in sizes:
        for weight_norm in STARTS:
            if weight_norm or not size.brief:
                rows += measure_case(size, device, weight_norm=weight_norm, autocast=autocast, quick=quick)
    return rows


def measure_case(
    size: Size, device: str, *, weight_norm: bool, autocast: bool, quick: bool, deadline: float = math.inf
) -> Rows:
    """One row per contender at one size from one start.

    A contender that raises gets a row that says so. So does one whose turn to be tried comes after `deadline`, in
    seconds of time.monotonic(); plain and fused loss and the products are tried in any case.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it gives up, without a word, on a function that it has compiled eight times
    inputs = Inputs(size, device, weight_norm=weight_norm)
    calls, missing = _contenders(inputs)
    steps: dict[str, Callable[[], object]] = {
        name: partial(_step, call, inputs, autocast) for name, call in calls.items()
    }
    steps[contenders.PRODUCTS] = partial(_floor, inputs, autocast)
    for name in list(steps):
        late = name not in (contenders.PLAIN, contenders.FUSED, contenders.PRODUCTS) and time.monotonic() > deadline
        why = "no time was left" if late else _failure(steps[name], device)
        if why is not None:
            missing[name] = why
            del steps[name]
    forwards = {name: partial(_forward, calls[name], inputs, autocast) for name in steps if name in calls}
    seconds = interleaved_medians(
        steps | {f"{name}, forward": call for name, call in forwards.items()},
        rounds=3 if quick else 5 if size.brief else 7,
        seconds=0.0 if quick else 0.05,
        device=device,
    )
    rows: Rows = []
    for name, step in steps.items():
        row = _labels(size, weight_norm, name) | {"step_s": seconds[name]}
        if name in forwards:
            row |= {"forward_s": seconds[f"{name}, forward"]} | _memory(step, forwards[name], inputs, device)
        rows.append(row | (work(step) if name in EAGER else {}))
    rows += [_labels(size, weight_norm, name) | {"missing": why} for name, why in missing.items()]
    return [{key: _short(value) for key, value in row.items()} for row in rows]


def memory_by_batch(device: str, *, autocast: bool) -> Rows:
    """Extra memory of 10 crops and K = 65 536 against the number of images, from the head's parameters."""
    rows: Rows = []
    for images in progress(BATCHES[device], desc="memory by batch"):
        size = Size("", 10, images, 65536)
        inputs = Inputs(size, device, weight_norm=True)
        for name, call in {contenders.PLAIN: contenders.plain, contenders.FUSED: contenders.fused}.items():
            forward = partial(_forward, call, inputs, autocast)
            memory = _memory(partial(_step, call, inputs, autocast), forward, inputs, device)
            rows.append({"contender": name, "images": images, "extra_bytes": memory["extra_bytes"]})
    return rows


def measure_chunks(size: Size, device: str, mebibytes: Iterable[int], *, autocast: bool, quick: bool) -> Rows:
    """Time and memory of the fused loss from the head's parameters, for chunks of so many MiB of logits in float32."""
    inputs = Inputs(size, device, weight_norm=True)
    calls = {
        budget: partial(contenders.fused, chunk_rows=max(1, budget * 2**20 // (4 * size.prototypes)))
        for budget in mebibytes
    }
    steps = {budget: partial(_step, call, inputs, autocast) for budget, call in calls.items()}
    seconds = interleaved_medians(
        {str(budget): step for budget, step in steps.items()},
        rounds=3 if quick else 7,
        seconds=0.0 if quick else 0.05,
        device=device,
    )
    rows = []
    for budget, call in calls.items():
        memory = _memory(steps[budget], partial(_forward, call, inputs, autocast), inputs, device)
        row = {"size": str(size), "mebibytes": budget, "chunk_rows": call.keywords["chunk_rows"]}
        rows.append(row | {"step_s": _short(seconds[str(budget)]), "extra_bytes": memory["extra_bytes"]})
    return rows


def _contenders(inputs: Inputs) -> tuple[dict[str, contenders.Contender], dict[str, str]]:
    """(losses by name, why the others are missing by name)."""
    calls: dict[str, contenders.Contender] = {contenders.PLAIN: contenders.plain}
    missing: dict[str, str] = {}
    if inputs.size.brief:
        return calls | {contenders.FUSED: contenders.fused}, missing
    calls |= {
        contenders.COMPILED: torch.compile(contenders.plain, dynamic=False),
        contenders.UNFUSED: contenders.unfused,
        contenders.FUSED: contenders.fused,
        contenders.LINEAR: contenders.linear,
    }
    if not inputs.y.is_cuda:
        calls[contenders.FUSED_COMPILED] = torch.compile(contenders.fused, dynamic=False)
    else:
        calls[contenders.CHUNKED] = chunked.by_chunks
        calls[contenders.CHUNKED_COMPILED] = partial(chunked.by_chunks, compiled=True)
        calls[contenders.SDPA] = partial(attention.by_attention, attention=attention.sdpa)
        calls[contenders.FLEX] = partial(attention.by_attention, attention=attention.flex)
    if not inputs.weight_norm:
        found, missing = peers.available(inputs.size)
        calls |= found
    return calls, missing


def _failure(call: Callable[[], object], device: str) -> str | None:
    """What `call` raises, in a line: a kernel that does not take this size, a compiler that is not there, no memory."""
    why = None
    try:
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    except Exception as error:
        why = f"failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    if why is not None:
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises again where the GPU itself is out of order: nothing can follow then
    return why


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
