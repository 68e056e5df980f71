"""Runs a function on several processes that talk over gloo.

They are forked from a process that has imported what most of them need and has done nothing else, because importing
takes longer than what most of these tests do.
"""

import faulthandler
import inspect
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "transformers.models.vit.modeling_vit", "vmf_heads.compat"]
SECONDS = 480  # for the longest of these tests on a busy machine; a rank that takes longer hangs


def run_on_ranks(function: Callable[[int], Any], ranks: int = 2, *, seconds: float = SECONDS) -> list[Any]:
    """[function(0), function(1), ...], each from a fresh process of one group; the function stands at module level.

    What it returns must be tensors, numbers and strings, or lists and dicts of them. An exception in a rank is raised
    here with that rank's traceback. Ranks that still run after `seconds` write their stacks to stderr and are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.get_context("forkserver").set_forkserver_preload(IMPORTED)
        arguments = (ranks, inspect.getfile(function), function.__name__, folder, seconds, dict(os.environ))
        context = mp.start_processes(_rank, arguments, nprocs=ranks, join=False, start_method="forkserver")
        deadline = time.monotonic() + seconds
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    late = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    raise TimeoutError(f"ranks {late} of {function.__name__} did not end within {seconds} seconds")
        finally:
            for process in context.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGABRT)
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, path: str, name: str, folder: str, seconds: float, environment: dict[str, str]
) -> None:
    os.environ.update(environment)  # the process that it was forked from may be older than a variable
    faulthandler.enable()  # SIGABRT: it says where it was
    torch.set_num_threads(1)
    rendezvous = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=seconds), world_size=ranks, rank=rank)
    # By path: a new process does not know the names under which pytest imports the test modules.
    function = runpy.run_path(path)[name]
    torch.save(function(rank), Path(folder, f"{rank}.pt"))
    # The process ends without Python's own finalisation. Something still refers to the group after DDP or FSDP2, so
    # that destroy_process_group() stops none of its threads, and a thread that needs the interpreter while it is taken
    # down aborts the process (pytorch#190489, #179291). The barrier comes first because a rank that left earlier would
    # break off the last message of another.
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
