"""A rank that fails ends torchrun and all ranks, and the cause is the first error that is printed."""

from pathlib import Path

import pytest
from benchmarks import rank_faults
from benchmarks.rank_faults import CAUSE, Ending, broken_promises, ending_after

from training.run import load_checkpoint

SOUND = Ending(1, 1.0, 1.0, [], f"  0%|  | 0/9pretrain.py: error: {CAUSE}\npretrain.py: error: another process\n")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rank"), [("explained", 1), ("killed", 0), ("loader killed", 1)])
def test_a_rank_that_fails_ends_them_all(fault: str, rank: int, tmp_path: Path) -> None:
    ending = ending_after(fault, rank, 5, tmp_path)  # it returns when no process of torchrun is left
    assert broken_promises(fault, ending) == [], ending.stderr
    assert load_checkpoint(tmp_path / "run")["step"] == 0  # to resume from


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"exit_status": 0}, ["torchrun ended with status 0"]),
        ({"left": [7]}, ["ranks [7] were left"]),
        (
            {"stderr": f"pretrain.py: error: another process ended\npretrain.py: error: {CAUSE}\n"},
            [f"the first error is 'pretrain.py: error: another process ended', not 'pretrain.py: error: {CAUSE}'"],
        ),
        ({"stderr": ""}, [f"the first error is '', not 'pretrain.py: error: {CAUSE}'"]),
    ],
)
def test_a_broken_promise_would_be_seen(change: dict, broken: list[str]) -> None:
    assert broken_promises("explained", Ending(**vars(SOUND) | change)) == broken


def test_the_number_of_repetitions_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`repetitions` \(=0\) must be at least 1"):
        rank_faults.rank_faults(repetitions=0)
