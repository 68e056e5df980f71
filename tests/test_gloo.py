"""The processes that other tests start: their results, their exceptions, their ending."""

import atexit
import os
import time

import pytest
import torch
import torch.distributed as dist

from gloo import run_on_ranks


def sum_of_ranks(rank: int) -> dict[str, object]:
    atexit.register(os.abort)  # what a gloo thread does to a process that finalises Python while the thread ends
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return {"rank": rank, "sum": total}


def test_the_ranks_are_of_one_group_and_end_without_finalising_python() -> None:
    assert run_on_ranks(sum_of_ranks) == [{"rank": rank, "sum": torch.tensor([3.0])} for rank in range(2)]


def second_rank_fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_an_exception_in_a_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(Exception, match=r"(?s)Process 1 .*in second_rank_fails.*ValueError: the reason"):
        run_on_ranks(second_rank_fails)


def second_rank_hangs(rank: int) -> None:
    if rank == 1:
        time.sleep(600)


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of second_rank_hangs did not end within 1 seconds"):
        run_on_ranks(second_rank_hangs, seconds=1)
