"""Exact peak memory of a call: from the allocator's own record, not from samples of the process."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors that `call` held at a time on top of what existed before; it must free none of those."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()  # alive until the record ends, as on CUDA
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most
