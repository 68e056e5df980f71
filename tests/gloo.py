"""Runs a function on several processes that talk over gloo."""

import inspect
import runpy
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[[int], Any], ranks: int = 2) -> list[Any]:
    """[function(0), function(1), ...], each from a fresh process of one group; the function stands at module level.

    What it returns must be tensors, numbers and strings, or lists and dicts of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, inspect.getfile(function), function.__name__, folder), nprocs=ranks)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, path: str, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=ranks, rank=rank)
    # By path: a new process does not know the names under which pytest imports the test modules.
    function = runpy.run_path(path)[name]
    torch.save(function(rank), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
