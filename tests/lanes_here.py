"""Jobs of runtime.lanes in this process: their commands, without the seconds that each start of Python takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

import evaluate
import pretrain
from runtime.lanes import Job


def run_lanes_here(lanes: Mapping[str, Sequence[Job]]) -> None:
    """Do every job by the function behind its command line; what real processes add is shown by the demo's test."""
    for job in [job for jobs in lanes.values() for job in jobs]:
        script, *arguments = job.command[1:]
        if Path(script).name == "pretrain.py":
            pretrain.main(tyro.cli(pretrain.Options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)))
        else:
            assert Path(script).name == "evaluate.py"
            evaluate.main(arguments)
